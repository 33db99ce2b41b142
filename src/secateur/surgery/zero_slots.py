"""The other published meaning of a removed expert: its slot stays in the router and contributes nothing.

arXiv 2405.16646, authors' token-choice code: softmax and top-k still run over all slots, so the kept experts keep their
weights, and a token whose slots are all removed gets nothing. (To cut the rows of the router, so that tokens go to the
next experts, is `prune_model_`.)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.expert_axis import gather, is_sharded
from secateur.families import describe_moe
from secateur.modeling_secateur import replace_tensor_, set_attributes_, skip_removed_
from secateur.plans import REROUTE, LayerPlan, Plan
from secateur.surgery.config_json import moe_config
from secateur.surgery.fits import check_plan_fits
from secateur.surgery.module import become_pruned_, locate, router_tensors


def remove_into_zero_slots_(model: nn.Module, plan: Plan) -> None:
    """Drop the experts that `plan` drops from a live transformers model and leave its routers as they are, in place.

    The model becomes what `secateur apply --removed zero-slot` makes of its folder: its `Pruned...` class, which
    `save_pretrained` writes and transformers loads. Call it before an optimizer is made: parameters are replaced.
    Where there are zero slots already, the plan is about the experts that are left, in their order.

    Raises:
        SecateurError: the plan does not fit the model or says that tokens are re-routed, or the model is of a family
            that cannot have zero slots, or is sharded.
    """
    if plan.removed == REROUTE:
        raise SecateurError(f"plan: its removed experts are {REROUTE!r}; prune_model_ does that")
    moe = describe_moe(model, zero_slots=True)
    check_plan_fits(plan, moe.counts, min_experts=1, num_groups=1)
    kept = kept_after(moe.slots, moe.kept, plan.layers)
    if not kept:
        return
    new_tensors: list[tuple[nn.Module, str, Tensor]] = []
    for layer, layer_plan in plan.layers.items():
        routers = router_tensors(moe.blocks[layer])
        for spec in (spec for spec in moe.blocks[layer].tensors if spec not in routers):
            owner, key = locate(moe.model, spec.name)
            if is_sharded(getattr(owner, key)):
                raise SecateurError(f"{spec.name} is sharded over ranks; expected a whole model")
            new_tensors.append((owner, key, gather(getattr(owner, key), spec, layer_plan)))
    try:
        skip_removed_(moe.model, moe.layout, moe.slots, kept)
    except ValueError as error:
        raise SecateurError(f"model type {moe.model_type!r}: {error}") from error
    for owner, key, value in new_tensors:
        replace_tensor_(owner, key, value)
    set_attributes_(moe.model, moe.layout, moe.slots, kept)
    become_pruned_(moe.model, moe_config(moe.slots, moe.model.config.num_hidden_layers, kept))


def kept_after(
    slots: Mapping[int, int], kept: Mapping[int, tuple[int, ...]], layers: Mapping[int, LayerPlan]
) -> dict[int, tuple[int, ...]]:
    """{layer: slots whose experts it holds, in their order} after a plan; a layer that has all in order is left out.

    Args:
        slots: {layer: slots of its router}. kept: the same as what is returned, before the plan. layers: of the plan.
    """
    after = dict(kept)
    for layer, layer_plan in layers.items():
        now = kept.get(layer, tuple(range(slots[layer])))
        after[layer] = tuple(now[old] for old in layer_plan.order)
    return {layer: ids for layer, ids in after.items() if layer in kept or ids != tuple(range(slots[layer]))}
