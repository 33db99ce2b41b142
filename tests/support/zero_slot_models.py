"""What tests of zero slots share: plans, and the source's own answer with the gates of removed experts at 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families import logits_of
from secateur.plans import ZERO_SLOT, LayerPlan, Plan

# Fewer than any top-k, and not the same number of a group: a router that stays whole sets no limit.
ORDERS = ((0, 3, 5), (6,), (1, 2, 4, 7))
TURNED = ((5, 0, 3), (6,), (4, 2, 1, 7))


def zero_slot_plan(layers: Iterable[int], orders: tuple[tuple[int, ...], ...] = ORDERS, **fields: Any) -> Plan:
    """The orders in turn, for layers of 8 experts."""
    chosen = {layer: LayerPlan(experts_before=8, order=orders[turn % len(orders)]) for turn, layer in enumerate(layers)}
    return Plan(layers=chosen, criterion="test", **{"removed": ZERO_SLOT} | fields)


def silenced_logits(model: nn.Module, plan: Plan, inputs: Tensor) -> Tensor:
    """Logits of a whole model in which the gates of the experts that `plan` drops are 0: what zero slots must give.

    Only to rounding: the experts run on more tokens here, and vectors of activations of another length round otherwise.
    """

    def without_gates(dropped: tuple[int, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, gates = args
            return hidden, index, torch.where(sum(index == old for old in dropped) > 0, 0.0, gates)

        return hook

    hooks = []
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if name.endswith(".experts") and numbers and numbers[0] in plan.layers:
            dropped = plan.layers[numbers[0]].dropped
            hooks += [module.register_forward_pre_hook(without_gates(dropped))] if dropped else []
    assert hooks
    try:
        return logits_of(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def check_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
