"""The barred-experts oracle: the pruned model equals it, it equals a second oracle, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe, logits_of
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.oracle import barred_experts
from support.tiny_models import (
    FAMILIES,
    KINDS,
    every_family,
    everything,
    families,
    random_plan,
    random_tokens,
    tiny_model,
)

ROUNDING = 1e-5


@pytest.mark.parametrize("name", families(FAMILIES.keys(), KINDS))
def test_pruned_logits_equal_the_oracle_bit_for_bit(name: str) -> None:
    moe = describe_moe(tiny_model(name))
    tokens = random_tokens(2, 16)
    plan = random_plan(moe, tokens, seed=1)
    whole = logits_of(moe.model, tokens)
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    assert not torch.equal(whole, expected), "the plan changes nothing, so this test could not fail"
    assert torch.equal(logits_of(moe.model, tokens), whole)
    prune_model_(moe, plan)
    assert torch.equal(logits_of(moe.model, tokens), expected)


@every_family
def test_pruned_logits_in_another_order_equal_the_oracle_to_rounding(name: str) -> None:
    moe = describe_moe(tiny_model(name))
    tokens = random_tokens(2, 16)
    plan = random_plan(moe, tokens, seed=2, ascending=False)
    assert any(not one.is_ascending for one in plan.layers.values())
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    prune_model_(moe, plan)
    torch.testing.assert_close(logits_of(moe.model, tokens), expected, rtol=0, atol=ROUNDING)


class MinusInfinity(TorchFunctionMode):
    """A second oracle, made without Secateur's layout: router outputs of dropped experts become -inf."""

    def __init__(self, dropped: dict[int, list[int]]) -> None:
        super().__init__()
        self.dropped = dropped  # id of a router weight -> experts
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self.dropped:
            self.used.add(id(args[1]))
            result = result.index_fill(-1, torch.tensor(self.dropped[id(args[1])]), float("-inf"))
        return result


def logits_with_minus_infinity(moe: MoEModel, name: str, plan: Plan, tokens: Tensor) -> Tensor:
    """Logits of the whole model when dropped experts score -inf, in the selection biases too."""
    family, weights = FAMILIES[name], {}
    for layer, one in plan.layers.items():
        for key, dim in family.tensors.items():
            if key.startswith("experts."):
                continue
            tensor = dict(moe.model.state_dict(keep_vars=True))[f"{family.block.replace('N', str(layer))}.{key}"]
            if key.endswith("weight"):
                weights[id(tensor)] = list(one.dropped)
            else:
                with torch.no_grad():
                    tensor.index_fill_(dim, torch.tensor(one.dropped), float("-inf"))
    with MinusInfinity(weights) as mode:
        logits = logits_of(moe.model, tokens)
    assert mode.used == set(weights), "a router was not reached"
    return logits


@every_family
def test_the_oracle_equals_setting_the_dropped_logits_to_minus_infinity(name: str) -> None:
    moe = describe_moe(tiny_model(name))
    tokens = random_tokens(2, 16)
    plan = random_plan(moe, tokens, seed=3)
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    torch.testing.assert_close(logits_with_minus_infinity(moe, name, plan, tokens), expected, rtol=0, atol=ROUNDING)


@every_family
def test_the_oracle_leaves_the_model_unchanged(name: str) -> None:
    moe = describe_moe(tiny_model(name))
    before = everything(moe.model)
    with barred_experts(moe, random_plan(moe, ascending=False)):
        assert everything(moe.model) != before
        logits_of(moe.model, random_tokens(1, 8))
    assert everything(moe.model) == before


def test_the_oracle_leaves_the_model_unchanged_after_an_error_inside() -> None:
    moe = describe_moe(tiny_model("gpt_oss"))
    before = everything(moe.model)
    with pytest.raises(KeyboardInterrupt), barred_experts(moe, random_plan(moe)):
        raise KeyboardInterrupt
    assert everything(moe.model) == before


def test_a_plan_for_another_model_is_refused_before_anything_is_barred() -> None:
    moe = describe_moe(tiny_model("mixtral"))
    before = everything(moe.model)
    plan = Plan(layers={0: LayerPlan(experts_before=8, order=(1, 2)), 7: LayerPlan(experts_before=8, order=(1, 2))},
                criterion="wrong")  # fmt: skip
    with pytest.raises(SecateurError, match="layer 7"), barred_experts(moe, plan):
        raise AssertionError("not reached")
    assert everything(moe.model) == before


def test_logits_are_taken_in_evaluation_mode_and_every_module_gets_its_mode_back() -> None:
    model = tiny_model("mixtral", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    tokens = random_tokens(1, 8)
    first, second = logits_of(model, tokens), logits_of(model, tokens)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_modes_come_back_after_an_error() -> None:
    model = tiny_model("mixtral").train()
    with pytest.raises(IndexError):
        logits_of(model, torch.full((1, 4), 10_000))
    assert all(module.training for module in model.modules())
