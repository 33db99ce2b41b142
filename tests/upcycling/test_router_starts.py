"""How routers begin: the table of starts, the sums of the ridge, and what each router's rows are made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.errors import SecateurError
from secateur.upcycling import running
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import read_parents
from secateur.upcycling.ridge import RELATIVE_LAMBDA, RidgeSums
from secateur.upcycling.starts import STARTS, LayerSeen
from secateur.upcycling.upcycle import upcycle
from support.dense_models import texts_in
from support.grown import faults, tensors

SIZE: dict[str, Any] = {"samples": 3, "sequence_length": 16}


def sums_of(inputs: Tensor, domains: Tensor, count: int) -> RidgeSums:
    return RidgeSums.of(inputs, torch.nn.functional.one_hot(domains, count))


@pytest.fixture
def seen() -> tuple[Tensor, Tensor]:
    """(200 inputs of width 12 around three means that are far apart, their domains)."""
    generator = torch.Generator().manual_seed(0)
    means = 4 * torch.randn(3, 12, generator=generator)
    domains = torch.randint(3, (200,), generator=generator)
    return means[domains] + 0.3 * torch.randn(200, 12, generator=generator), domains


def test_the_ridge_finds_domains_that_are_apart(seen: tuple[Tensor, Tensor]) -> None:
    inputs, domains = seen
    rows = STARTS["ridge"].rows(3, 12, 0.0, 0, LayerSeen(sums=sums_of(inputs, domains, 3), largest=1.0))
    assert torch.equal((inputs.double() @ rows.T).argmax(1), domains)


def test_the_ridge_is_the_least_squares_solution_of_the_damped_system(seen: tuple[Tensor, Tensor]) -> None:
    inputs, domains = seen[0].double(), torch.nn.functional.one_hot(seen[1], 3).double()
    damping = RELATIVE_LAMBDA * inputs.square().sum() / 12
    stacked = torch.cat([inputs, damping.sqrt() * torch.eye(12, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([domains, torch.zeros(12, 3, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(RidgeSums.of(inputs, domains).solve(), wanted, rtol=1e-9, atol=1e-12)


def test_sums_of_two_halves_are_those_of_the_whole_and_a_parent_is_added_by_its_rows(
    seen: tuple[Tensor, Tensor],
) -> None:
    inputs, domains = seen
    whole = sums_of(inputs, domains, 3)
    halves = sums_of(inputs[:90], domains[:90], 3) + sums_of(inputs[90:], domains[90:], 3)
    old = domains < 2
    grown = sums_of(inputs[old], domains[old], 2).with_unit(inputs[~old])
    for other in (halves, grown, RidgeSums.zero(3, 12) + whole):
        for name in ("hh", "yh", "counts"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grown.solve(), whole.solve(), rtol=1e-9, atol=1e-12)


def test_random_rows_have_the_spread_that_was_asked_for() -> None:
    rows = STARTS["random"].rows(50, 400, 0.07, 3, None)
    assert float(rows.std()) == pytest.approx(0.07, rel=0.02)
    assert torch.equal(rows, STARTS["random"].rows(50, 400, 0.07, 3, None))
    assert not torch.equal(rows, STARTS["random"].rows(50, 400, 0.07, 4, None))
    assert not STARTS["random"].rows(5, 4, 0.0, 3, None).any()


def test_norm_rows_are_small_enough_for_every_weight_to_stay_near_1() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(100, 12)
    sums = RidgeSums.of(inputs, torch.rand(100, 6))
    rows = STARTS["norm"].rows(6, 12, 0.0, 0, LayerSeen(sums=sums, largest=float(inputs.norm(dim=1).max())))
    weights = torch.softmax(inputs.double() @ rows.T, dim=1) * 6
    assert float((weights - 1).abs().max()) <= 0.01
    order = (inputs.double() @ sums.solve().T).argsort(1)
    assert torch.equal((inputs.double() @ rows.T).argsort(1), order)
    one = torch.zeros(1, 100)
    one[0, 7] = 1.0
    sums = RidgeSums.of(torch.ones(1, 12), one)
    rows = STARTS["norm"].rows(100, 12, 0.0, 0, LayerSeen(sums=sums, largest=12**0.5))
    weights = torch.softmax(torch.ones(1, 12).double() @ rows.T, dim=1)[0] * 100
    assert 1.0098 < float(weights[7]) <= 1.01  # no smaller than it must be
    silent = RidgeSums.of(inputs, torch.zeros(100, 6))
    assert not STARTS["norm"].rows(6, 12, 0.0, 0, LayerSeen(sums=silent, largest=1.0)).any()


def test_a_domain_without_a_token_is_an_error() -> None:
    sums = sums_of(torch.ones(4, 3), torch.tensor([0, 0, 2, 2]), 3)
    with pytest.raises(SecateurError, match="--router hidden: no token of domain 1"):
        STARTS["hidden"].rows(3, 3, 0.0, 0, LayerSeen(sums=sums, largest=1.0))


@torch.no_grad()
def inputs_of(parent: Path, domains: list[list[Tensor]], module: str) -> list[list[Tensor]]:
    """[domain][layer] (T, D): what a module of each layer of a model gets, seen by other code."""
    model = AutoModelForCausalLM.from_pretrained(parent).eval()
    norm = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}[module]
    found = []
    for rows in domains:
        layers: list[list[Tensor]] = [[] for _ in model.model.layers]
        hooks = [
            getattr(layer, norm).register_forward_hook(lambda _, args, out, seen=layers[at]: seen.append(out[0]))
            for at, layer in enumerate(model.model.layers)
        ]
        for row in rows:
            model(row[None])
        for hook in hooks:
            hook.remove()
        found.append([torch.cat(one).double() for one in layers])
    return found


@pytest.mark.parametrize("router", ["hidden", "ridge"])
@pytest.mark.parametrize("form", ["btx", "bam"])
def test_rows_are_made_of_what_the_router_will_see(router: str, form: Any, llamas: list[Path], tmp_path: Path) -> None:
    data = texts_in(tmp_path)
    options: dict[str, Any] = {"form": form, "router": router, "router_data": data, **SIZE}
    upcycle(llamas[:2], tmp_path / "out", **options)
    domains = running.sequences(read_parents(llamas[:2]), Asked(form=form, router_data=tuple(data), **SIZE))
    assert [len(rows) for rows in domains] == [3, 3]
    made = tensors(tmp_path / "out")
    names = {"mlp": "mlp.gate" if form == "bam" else "block_sparse_moe.gate"}
    if form == "bam":
        names["self_attn"] = "self_attn.router"
    for module, name in names.items():
        seen = inputs_of(llamas[0], domains, module)
        for layer in range(2):
            rows = [one[layer] for one in seen]
            if router == "hidden":
                wanted = torch.nn.functional.normalize(torch.stack([one.mean(0) for one in rows]), dim=1)
            else:
                hidden = torch.cat(rows)
                y = torch.nn.functional.one_hot(torch.tensor([0] * len(rows[0]) + [1] * len(rows[1])))
                damped = hidden.T @ hidden
                damped += RELATIVE_LAMBDA * damped.trace() / 32 * torch.eye(32)
                wanted = (y.double().T @ hidden) @ torch.linalg.inv(damped)
            found = made[f"model.layers.{layer}.{name}.weight"]
            torch.testing.assert_close(found, wanted.float(), rtol=2e-3, atol=1e-4)
    assert not faults(llamas[:2], tmp_path / "out")


def test_pieces_of_one_parent_begin_with_its_row(llamas: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"router": "hidden", "router_data": texts_in(tmp_path), **SIZE}
    upcycle(llamas[:2], tmp_path / "whole", **options)
    upcycle(llamas[:2], tmp_path / "cut", granularity=3, **options)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    whole, cut = tensors(tmp_path / "whole")[name], tensors(tmp_path / "cut")[name]
    assert torch.equal(cut, whole.repeat_interleave(3, dim=0))


def test_norm_rows_prefer_the_experts_that_add_most(llamas: list[Path], tmp_path: Path) -> None:
    """The dense model's neurons are scaled so that the first experts add far more than the last."""
    parent = Path(shutil.copytree(llamas[0], tmp_path / "parent"))
    found = load_file(parent / "model.safetensors")
    scale = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25]).repeat_interleave(8)
    for name in found:
        if name.endswith("down_proj.weight"):
            found[name] *= scale
    save_file(found, parent / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"form": "split", "experts": 6, "top_k": 2, "router_data": texts_in(tmp_path), **SIZE}
    upcycle([parent], tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: chosen.append(output[2]))
    rows = running.sequences(
        read_parents([parent]), Asked(form="split", router_data=tuple(options["router_data"]), **SIZE)
    )
    with torch.no_grad():
        for row in rows[0]:
            model(row[None])
    counts = torch.cat(chosen).flatten().bincount(minlength=6)
    assert float(counts[:2].sum() / counts.sum()) > 0.5  # a third by chance; it has no constant to lean on
    assert float(counts[4:].sum() / counts.sum()) < 0.1


def test_another_number_of_texts_than_of_parents(llamas: list[Path], tmp_path: Path) -> None:
    data = texts_in(tmp_path)
    with pytest.raises(SecateurError, match="--router-data: found 2, expected one for each of the 3 parents"):
        upcycle(llamas, tmp_path / "out", router="ridge", router_data=data)
    with pytest.raises(SecateurError, match=r"nothing\.txt"):
        upcycle(llamas[:2], tmp_path / "out", router="ridge", router_data=[data[0], f"x={tmp_path / 'nothing.txt'}"])
    assert not (tmp_path / "out").exists()
