"""The self-check of a pruning passes what is rounding by its type and order of sums, and finds what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.self_check import CLOSE, expected_of, layer_excess, logit_difference
from support.tiny_models import random_plan, random_tokens, tiny_model

SAMPLE = random_tokens(1, 32)


def reversed_plan(moe: Any) -> Plan:
    layers = {layer: LayerPlan(experts_before=8, order=(6, 5, 4, 2, 1, 0)) for layer in moe.counts}
    return Plan(layers=layers, criterion="test")


def pruned(dtype: torch.dtype, implementation: str, *, keeps_order: bool) -> Any:
    model = tiny_model("mixtral", num_experts_per_tok=4).to(dtype).eval()
    model.set_experts_implementation(implementation)
    moe = describe_moe(model)
    plan = random_plan(moe) if keeps_order else reversed_plan(moe)
    expected = expected_of(moe, plan, SAMPLE)
    return prune_model_(moe, plan), expected


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_order_is_kept_nothing_differs_by_a_bit(dtype: torch.dtype, implementation: str) -> None:
    moe, expected = pruned(dtype, implementation, keeps_order=True)
    assert logit_difference(moe, expected) == (0.0, 0.0)
    assert layer_excess(moe, expected, 1) == (0.0, "no layer differs")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_order_of_sums_is_within_the_bound_of_its_type(dtype: torch.dtype, implementation: str) -> None:
    moe, expected = pruned(dtype, implementation, keeps_order=False)
    excess, _ = layer_excess(moe, expected, 1)
    assert excess < 1
    if (dtype, implementation) == (torch.bfloat16, "eager"):
        assert logit_difference(moe, expected)[1] > CLOSE  # which alone would have ended the run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["experts", "router"])
def test_experts_or_routers_that_are_not_those_of_the_plan_are_found(what: str, dtype: torch.dtype) -> None:
    moe, expected = pruned(dtype, "eager", keeps_order=False)
    block = moe.blocks[1]
    tensors = list(block.experts.parameters()) if what == "experts" else list(block.router.parameters())
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor.roll(1, dims=0))
    excess, line = layer_excess(moe, expected, 1)
    assert excess > 1
    assert line.startswith("layer 1 differs by ")
    assert logit_difference(moe, expected)[1] > CLOSE
