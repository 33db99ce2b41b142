"""The other published meaning of a removed expert: its slot stays in the router and contributes nothing.

arXiv 2405.16646, authors' token-choice code: router rows are put in the order kept, removed; softmax and top-k still
run over all of them, so the kept experts keep their weights, and a token whose slots are all removed gets nothing.
(To cut the rows, so that tokens go to the next experts, is what `secateur apply` does.)
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import SecateurError
from secateur.families import MoEBlock, describe_moe
from secateur.modeling_secateur import replace_tensor_
from secateur.plan import LayerPlan, Plan
from secateur.surgery.module import check_plan, locate, router_tensors
from secateur.surgery.tensors import gather
from secateur.vision.configuration import VMoEConfig


def remove_into_zero_slots_(model: nn.Module, plan: Plan) -> None:
    """Drop the experts that `plan` drops and keep their router rows as zero slots, in place.

    Call it before an optimizer is made: parameters are replaced. In an ensemble a slot stays with its member.

    Raises:
        SecateurError: not a V-MoE, the plan does not fit it, or the layers would end up with different counts.
    """
    moe = describe_moe(model)
    config = moe.model.config
    if type(config) is not VMoEConfig:
        raise SecateurError(f"zero slots are for V-MoE models with one expert count, found {type(config).__name__}")
    check_plan(moe, plan)
    counts = moe.counts | {layer: one.experts_after for layer, one in plan.layers.items()}
    if len(set(counts.values())) > 1:
        raise SecateurError(f"zero slots: all MoE layers must keep the same number of experts, the plan keeps {counts}")
    for layer, one in plan.layers.items():
        _cut_(moe.model, moe.blocks[layer], one)
    config.num_zero_slots += config.num_experts - next(iter(counts.values()))
    config.num_experts = next(iter(counts.values()))


def router_order(one: LayerPlan, num_zero_slots: int, num_members: int) -> list[int]:
    """Old router row of every new one: kept experts, then of each member its zero slots and what it loses."""
    size, zero = one.experts_before // num_members, num_zero_slots // num_members
    rows = list(one.order)
    for member in range(num_members):
        first = one.experts_before + member * zero
        rows += range(first, first + zero)
        rows += [old for old in one.dropped if old // size == member]
    return rows


def _cut_(model: PreTrainedModel, block: MoEBlock, one: LayerPlan) -> None:
    rows = router_order(one, model.config.num_zero_slots, model.config.ensemble_size)
    routers = router_tensors(block)
    for spec in block.tensors:
        owner, key = locate(model, spec)
        old = getattr(owner, key).detach()
        if spec in routers:
            value = old.index_select(spec.dim, torch.tensor(rows, device=old.device))
        else:
            value = gather(old, spec, one.order, one.experts_before)
        replace_tensor_(owner, key, value)
    vars(block.experts)["num_experts"] = one.experts_after
