"""Whether a plan fits the experts of a model, live or stored."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import SecateurError
from secateur.plan import LayerPlan, Plan


def check_fits(plan: Plan, counts: Mapping[int, int], *, min_experts: int, num_groups: int) -> None:
    """Compare a plan with the model it is for.

    Args:
        counts: experts of every MoE layer. min_experts, num_groups: what the routers need, see `families.router_needs`.

    Raises:
        SecateurError: a layer the model does not have, another number of experts, fewer left than the router needs, or
            experts that leave their router group.
    """
    for layer, one in plan.layers.items():
        if layer not in counts:
            raise SecateurError(f"plan: layer {layer} is not a MoE layer; MoE layers are {sorted(counts)}")
        found = counts[layer]
        if one.experts_before != found:
            raise SecateurError(f"plan: layer {layer} is for {one.experts_before} experts, the model has {found}")
        if one.experts_after < min_experts:
            raise SecateurError(
                f"plan: layer {layer} keeps {one.experts_after} experts, its router needs {min_experts}"
            )
        _check_groups(layer, one, num_groups)


def _check_groups(layer: int, one: LayerPlan, num_groups: int) -> None:
    if num_groups == 1:
        return
    size_before, size_after = one.experts_before // num_groups, one.experts_after // num_groups
    groups = [old // size_before for old in one.order]
    if one.experts_after % num_groups or groups != [new // size_after for new in range(one.experts_after)]:
        raise SecateurError(
            f"plan: layer {layer} has {num_groups} router groups; each must keep the same number of its own experts, "
            f"found the groups {groups} in the new order"
        )
