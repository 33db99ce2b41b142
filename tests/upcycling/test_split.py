"""One FFN, its neurons divided into experts: exact at all of them, weight 1 at any number, and which go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.files.progress import silent
from secateur.upcycling import neurons, running
from secateur.upcycling.forms import blueprint
from secateur.upcycling.neurons import balanced
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import read_parents
from secateur.upcycling.record import read_record
from secateur.upcycling.starts import WITHIN
from secateur.upcycling.upcycle import upcycle
from support.dense_models import parents_in, texts_in
from support.grown import NEAR, TOKENS, always, change_routers, faults, logits, model_in, tensors

WAYS: dict[str, dict[str, Any]] = {
    "order": {},
    "kmeans": {"division": "kmeans"},
    "coactivation": {"division": "coactivation"},
    "shared": {"shared_neurons": 16, "experts": 4},
    "shared, kmeans": {"shared_neurons": 16, "experts": 4, "division": "kmeans"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return texts_in(tmp_path_factory.mktemp("texts"))


def options(text: list[str], **more: Any) -> dict[str, Any]:
    asked = {"form": "split", "experts": 6, "samples": 4, "sequence_length": 24, "router_data": text, "router": "norm"}
    return asked | more


@pytest.mark.parametrize("way", WAYS)
def test_all_of_the_experts_are_the_dense_model(way: str, llamas: list[Path], text: list[str], tmp_path: Path) -> None:
    asked = options(text, **WAYS[way])
    upcycle(llamas[:1], tmp_path / "out", **{**asked, "top_k": asked["experts"]})
    model = model_in(tmp_path / "out")
    assert (model.config.model_type, model.config.norm_topk_prob, model.config.qkv_bias) == ("qwen2_moe", False, False)
    assert model.config.shared_expert_intermediate_size == asked.get("shared_neurons", 0)
    change_routers(tmp_path / "out", torch.zeros_like)
    assert torch.allclose(logits(tmp_path / "out"), logits(llamas[0]), **NEAR)


@pytest.mark.parametrize(("kind", "renormalise"), [("qwen2", False), ("qwen3", False), ("qwen3", True)])
def test_families_that_have_a_mixture_of_their_own(kind: str, renormalise: bool, tmp_path: Path) -> None:
    parents = parents_in(tmp_path, kind, 1)
    upcycle(parents, tmp_path / "out", form="split", experts=3, top_k=3, router="random", renormalise=renormalise)
    assert not faults(parents, tmp_path / "out")
    change_routers(tmp_path / "out", torch.zeros_like)
    assert torch.allclose(logits(tmp_path / "out"), logits(parents[0]), **NEAR)
    down = tensors(tmp_path / "out")["model.layers.0.mlp.experts.1.down_proj.weight"]
    assert torch.equal(down, tensors(parents[0])["model.layers.0.mlp.down_proj.weight"][:, 16:32] * 3)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_chosen_expert_has_weight_1_at_any_top_k(llamas: list[Path], top_k: int, tmp_path: Path) -> None:
    """At a zero router the mixture of the first experts is the dense model with only their neurons."""
    upcycle(llamas[:1], tmp_path / "out", form="split", experts=6, top_k=top_k, router="random")
    change_routers(tmp_path / "out", torch.zeros_like)
    model, dense = model_in(tmp_path / "out"), model_in(llamas[0])
    always(model, list(range(top_k)))
    for layer in dense.model.layers:
        layer.mlp.down_proj.weight.data[:, top_k * 8 :] = 0
    assert torch.allclose(logits(model), logits(dense), **NEAR)


def test_where_weights_are_renormalised_only_this_top_k_has_weight_1(tmp_path: Path) -> None:
    parents = parents_in(tmp_path, "qwen3", 1)
    result = upcycle(
        parents, tmp_path / "out", form="split", experts=6, top_k=2, router="random", renormalise=True
    ).to_json()
    assert result["down_projection_times"] == 2
    assert "at this top-k only" in result["function"]


def test_the_norm_router_chooses_by_norms_and_keeps_every_weight_near_1(
    llamas: list[Path], text: list[str], tmp_path: Path
) -> None:
    upcycle(llamas[:1], tmp_path / "out", **options(text, top_k=3))
    model = model_in(tmp_path / "out")
    weights: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: weights.append(output[1] * 6))
    with torch.no_grad():
        model(input_ids=TOKENS[:, :30])
    chosen = torch.cat(weights)
    assert chosen.shape[1] == 3
    assert float((chosen - 1).abs().max()) <= WITHIN
    assert float((chosen - 1).abs().max()) > WITHIN / 100


@pytest.mark.parametrize("way", WAYS)
def test_verify_finds_every_neuron_in_its_place(way: str, llamas: list[Path], text: list[str], tmp_path: Path) -> None:
    upcycle(llamas[:1], tmp_path / "out", **options(text, **{"top_k": 2, **WAYS[way]}))
    assert not faults(llamas[:1], tmp_path / "out")
    record, _ = read_record(tmp_path / "out")
    listed = record.division.get(0, tuple(range(48)))
    if way != "order":
        assert sorted(listed) == list(range(48))
        assert list(listed) != sorted(listed)
    new, old = tensors(tmp_path / "out"), tensors(llamas[0])
    shared = WAYS[way].get("shared_neurons", 0)
    at = list(listed[shared : shared + 8])
    for role in ("gate", "up"):
        part = new[f"model.layers.0.mlp.experts.0.{role}_proj.weight"]
        assert torch.equal(part, old[f"model.layers.0.mlp.{role}_proj.weight"][at])
    down = new["model.layers.0.mlp.experts.0.down_proj.weight"]
    assert torch.equal(down, old["model.layers.0.mlp.down_proj.weight"][:, at] * WAYS[way].get("experts", 6))
    if shared:
        busy = list(listed[:shared])
        down = new["model.layers.0.mlp.shared_expert.down_proj.weight"]
        assert torch.equal(down, old["model.layers.0.mlp.down_proj.weight"][:, busy] * 2)
        assert not new["model.layers.0.mlp.shared_expert_gate.weight"].any()


def test_the_shared_neurons_are_the_busiest(llamas: list[Path], text: list[str], tmp_path: Path) -> None:
    asked = Asked(**{**options(text, shared_neurons=16, experts=4, top_k=2), "router_data": tuple(text)})
    parents = read_parents(llamas[:1])
    rows = running.sequences(parents, asked)[0]
    busy = running.busy_neurons(parents, rows, silent)
    inner: list[list[Tensor]] = [[], []]
    model = AutoModelForCausalLM.from_pretrained(llamas[0])
    for at, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_hook(lambda _, args, out, seen=inner[at]: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for layer in range(2):
        size = torch.cat(inner[layer]).abs().T
        assert torch.equal(busy[layer], size >= size.topk(4, dim=0).values[-1])
    division = neurons.divide(parents, blueprint(asked, parents), asked, busy, silent)
    for layer in range(2):
        times = busy[layer].sum(1)
        assert busy[layer].shape == (48, sum(map(len, rows)))
        assert bool((busy[layer].sum(0) == 4).all())  # a tenth of 48
        assert int(times[division[layer][:16]].min()) >= int(times[division[layer][16:]].max())


def test_neurons_that_are_alike_come_together() -> None:
    """Planted groups: rows near one of four directions, shuffled."""
    torch.manual_seed(0)
    place = torch.randperm(32)
    directions = torch.linalg.qr(torch.randn(8, 8)).Q[:4]
    rows = (directions.repeat_interleave(8, dim=0) + 0.05 * torch.randn(32, 8))[place]
    found = balanced(rows, 4, seed=0)
    assert sorted(len(group) for group in found) == [8] * 4
    assert all(len({int(place[row]) // 8 for row in group}) == 1 for group in found)
    assert found == sorted(found)
    assert balanced(rows, 1, seed=0) == [list(range(32))]
