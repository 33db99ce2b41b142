"""The signed change of router norms finds the experts that training needed, and other scores fail where they must.

The margins are those of the published data model with the constants of `benchmarks/synthetic_experts.py`.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import synthetic_experts as toy

pytestmark = pytest.mark.slow
SEEDS = range(4)


@cache
def run(name: str) -> tuple[toy.Experts, toy.Experts, dict[str, Tensor]]:
    begin = toy.start(toy.VARIANTS[name], SEEDS)
    end = toy.train(begin, torch.Generator().manual_seed(1))
    return begin, end, end.scores(begin)


def on_new_samples(end: toy.Experts, kept: Tensor | None = None) -> dict[str, Tensor]:
    return toy.on_new_samples(end, torch.Generator().manual_seed(2), kept)


every_variant = pytest.mark.parametrize("name", toy.VARIANTS)


@every_variant
def test_relevant_experts_grow_and_the_others_do_not(name: str) -> None:
    change = run(name)[2]["signed change"]
    relevant = torch.zeros(toy.EXPERTS, dtype=torch.bool)
    relevant[list(toy.RELEVANT)] = True
    assert float(change[:, relevant].min()) >= 0.05
    assert float(change[:, ~relevant].max()) <= 0.02
    assert bool(toy.finds_relevant(change).all())


@every_variant
def test_half_of_the_experts_go_without_loss_if_they_are_the_right_half(name: str) -> None:
    _, end, scores = run(name)
    change = scores["signed change"]
    whole, right, wrong = (
        on_new_samples(end, kept) for kept in (None, toy.kept_by(change, 4), toy.kept_by(-change, 4))
    )
    assert float(whole["accuracy"].min()) >= 0.999
    assert float(right["accuracy"].min()) >= 0.999
    assert float(right["hinge"].max()) <= 0.02
    assert float(wrong["hinge"].min()) >= 0.85
    assert float(wrong["accuracy"].max()) <= (0.6 if name == "V2" else 0.85)


def test_the_final_norm_keeps_no_relevant_expert_where_the_others_began_larger() -> None:
    kept = toy.kept_by(run("V1")[2]["final norm"], 4)
    assert not kept[:, list(toy.RELEVANT)].any()


def test_only_the_signed_change_drops_a_harmful_expert_that_was_unlearned() -> None:
    scores = run("V3")[2]
    assert scores["signed change"].argmin(dim=1).tolist() == [3] * len(SEEDS)
    for name in ("absolute change", "norm of difference"):
        assert toy.kept_by(scores[name], 4)[:, 3].all()
        assert not toy.finds_relevant(scores[name]).any()


def test_gates_and_choices_are_those_of_the_definition_by_hand() -> None:
    """One sample of two tokens, patterns 0 and 2; each expert takes one token: that of its larger router entry."""
    setting = toy.Setting(d=4, n=2, tokens=1, m=1)
    router = torch.zeros(1, toy.EXPERTS, 4)
    neurons = torch.zeros(1, toy.EXPERTS, 1, 4)
    router[0, 0, 0], neurons[0, 0, 0] = 1.0, torch.tensor([0.5, 9.0, 7.0, 9.0])  # takes pattern 0: + 0.5
    router[0, 4, 2], neurons[0, 4, 0] = 1.0, torch.tensor([7.0, 9.0, 0.25, 9.0])  # takes pattern 2: - 0.25
    model = toy.Experts(setting=setting, router=router, neurons=neurons)
    tokens = torch.tensor([[[0, 2]]])
    assert toy.output(model, tokens).tolist() == [[0.25]]
    kept = torch.tensor([[expert != 4 for expert in range(toy.EXPERTS)]])
    assert toy.output(model, tokens, kept).tolist() == [[0.5]]
    both = toy.Experts(setting=toy.Setting(d=4, n=2, tokens=2, m=1), router=router, neurons=neurons)
    gate = torch.tensor([1.0, 0.0]).softmax(0)
    by_hand = gate @ torch.tensor([0.5, 7.0]) - gate @ torch.tensor([0.25, 7.0])
    assert toy.output(both, tokens)[0, 0].item() == pytest.approx(by_hand.item())
