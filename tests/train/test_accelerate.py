"""LAEP in loops of Accelerate: its optimizer wrapper, bf16, two optimizers, states that are saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from secateur.families import describe_moe
from secateur.train.laep import LAEP
from support.small_trainers import same_weights
from support.tiny_models import random_tokens, tiny_model


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """A script with two optimizers; frozen routers have none."""

    def __init__(self, *, precision: str = "no", frozen: bool = False, at_step: int = 3) -> None:
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.model = tiny_model("mixtral", output_router_logits=True).train()
        named = list(self.model.named_parameters())
        routers = [p for name, p in named if ".gate." in name]
        others = [p for name, p in named if ".gate." not in name]
        for parameter in routers if frozen else ():
            parameter.requires_grad_(False)
        optimizers = [torch.optim.AdamW(held, lr=1e-2) for held in ([others] if frozen else [others, routers])]
        self.train, *self.optimizers = self.accelerator.prepare(self.model, *optimizers)
        self.pruner = LAEP(self.model, self.optimizers, at_step=at_step, alpha=0.9, window_steps=2)
        self.accelerator.register_for_checkpointing(self.pruner)
        self.losses: list[float] = []

    def go(self, steps: range) -> None:
        for index in steps:
            tokens = random_tokens(4, 8, seed=index)
            loss = self.train(input_ids=tokens, labels=tokens).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.pruner.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.losses.append(loss.item())


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"frozen": True}], ids=["fp32", "bf16", "frozen"])
def test_a_loop_prunes_and_goes_on_with_the_balance_loss_of_layers_that_differ(settings: dict[str, Any]) -> None:
    loop = Loop(**settings)
    gate = loop.model.get_parameter("model.layers.0.mlp.gate.weight")
    loop.go(range(4))
    (event,) = loop.pruner.events
    assert event.oracle_max_abs_difference == 0.0
    assert len(set(describe_moe(loop.model).counts.values())) > 1
    before = gate.clone()
    loop.go(range(4, 6))
    assert torch.equal(before, gate) is settings.get("frozen", False)


def test_a_loop_that_is_resumed_before_the_pruning_is_the_whole_one_bit_for_bit(tmp_path: Path) -> None:
    whole = Loop()
    whole.go(range(2))
    whole.accelerator.save_state(str(tmp_path), safe_serialization=False)
    whole.go(range(2, 5))
    again = Loop()
    again.accelerator.load_state(str(tmp_path))
    again.go(range(2, 5))
    assert again.losses == whole.losses[2:]
    assert same_weights(again.model, whole.model)
    assert [event.plan for event in again.pruner.events] == [event.plan for event in whole.pruner.events]
