"""Whether a plan fits the experts of a model, live or stored."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import SecateurError
from secateur.plans import MIXED, REROUTE, LayerPlan, Plan


def check_multiple(counts: Mapping[int, int], expert_parallel: int) -> None:
    """Compare the experts that a plan leaves, {layer: count}, with the expert-parallel ranks that will hold them.

    Raises:
        SecateurError: a count is no multiple of the ranks.
    """
    for layer, count in counts.items():
        if count % expert_parallel:
            raise SecateurError(
                f"layer {layer}: {count} experts after the plan, expected a multiple of {expert_parallel} (--ep)"
            )


def check_copies(plan: Plan) -> None:
    """Refuse a plan that does more than keep, drop and move whole experts, which no room can apply yet.

    Raises:
        SecateurError: names the first such thing.
    """
    if (more := plan.beyond_copies()) is not None:
        raise SecateurError(
            f"plan: {more}; expected a plan that keeps, drops and moves whole experts: this release cannot apply others"
        )


def check_plan_fits(plan: Plan, counts: Mapping[int, int], *, min_experts: int, num_groups: int) -> None:
    """Compare a plan with the model it is for.

    Args:
        counts: experts of every MoE layer. min_experts, num_groups: what the routers need, see `families.router_needs`;
            routers that stay whole need nothing.

    Raises:
        SecateurError: a layer the model does not have, another number of experts, fewer left than the router needs,
            experts that leave their router group, steps composed that mean two things by removing an expert, or more
            than `check_copies` allows.
    """
    check_copies(plan)
    if plan.removed == MIXED:
        raise SecateurError("plan: its steps mean different things by removing an expert; apply them one after another")
    if plan.leaves_zero_slots:
        min_experts = num_groups = 1
    for layer, layer_plan in plan.layers.items():
        if layer not in counts:
            raise SecateurError(f"plan: layer {layer} is not a MoE layer; MoE layers are {sorted(counts)}")
        found = counts[layer]
        if layer_plan.experts_before != found:
            raise SecateurError(
                f"plan: layer {layer} is for {layer_plan.experts_before} experts, the model has {found}"
            )
        if layer_plan.experts_after < min_experts:
            raise SecateurError(
                f"plan: layer {layer} keeps {layer_plan.experts_after} experts, its router needs {min_experts}"
            )
        _check_groups(layer, layer_plan, num_groups)


def check_reroutes(plan: Plan) -> None:
    """Refuse a plan whose removed experts leave zero slots, where rows of routers will be cut.

    Raises:
        SecateurError: the plan says so, or as `check_copies`.
    """
    check_copies(plan)
    if plan.removed not in (None, REROUTE):
        raise SecateurError(
            f"plan: its removed experts are {plan.removed!r}, expected {REROUTE!r}: zero slots are made of a model's "
            "folder by `secateur apply`, or of a live model by secateur.remove_into_zero_slots_"
        )


def _check_groups(layer: int, layer_plan: LayerPlan, num_groups: int) -> None:
    if num_groups == 1:
        return
    size_before, size_after = layer_plan.experts_before // num_groups, layer_plan.experts_after // num_groups
    groups = [old // size_before for old in layer_plan.order]
    if layer_plan.experts_after % num_groups or groups != [
        new // size_after for new in range(layer_plan.experts_after)
    ]:
        raise SecateurError(
            f"plan: layer {layer} has {num_groups} router groups; each must keep the same number of its own experts, "
            f"found the groups {groups} in the new order"
        )
