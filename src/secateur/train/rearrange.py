"""When and how the kept experts are re-ordered over the expert-parallel ranks (LAEP, arXiv 2601.14327)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.errors import SecateurError
from secateur.placement import METHODS, Placement, balance, place, rank_loads
from secateur.plans import LayerPlan, Plan
from secateur.stats import RouterStats
from secateur.surgery.events import LayerPlacement
from secateur.train.schedule import check_count


@dataclass(frozen=True, kw_only=True)
class Rearrangement:
    """How experts are placed on ranks.

    ranks: R, None for the job's own expert-parallel size. every: also between prunings, at the end of the window in
    which this many steps have passed since the last change. method: a name of `placement.METHODS`. nodes: the ranks
    of a node are filled together. tolerance: between prunings, move as few experts as keep the balance within this
    share of what the method reaches.

    Raises:
        SecateurError: a number out of its range or an unknown method.
    """

    ranks: int | None = None
    every: int | None = None
    method: str = "swaps"
    nodes: int = 1
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "every", "nodes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.method not in METHODS:
            raise SecateurError(f"rearrangement method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise SecateurError(f"rearrangement tolerance is {self.tolerance}, expected 0 or more")
        if self.ranks is not None and self.ranks % self.nodes:
            raise SecateurError(f"{self.ranks} ranks do not divide over {self.nodes} nodes")


def rearranged(
    plan: Plan, loads: Mapping[int, Sequence[int]], rule: Rearrangement, num_ranks: int, num_groups: int
) -> tuple[Plan, dict[int, LayerPlacement]]:
    """The plan with the kept experts of every layer in the order that levels the ranks.

    Args:
        plan: keeps a multiple of `num_ranks` experts in every layer. loads: {layer: tokens of each expert before it}.

    Raises:
        SecateurError: see `placement.place`.
    """
    layers, placements = {}, {}
    for layer, layer_plan in plan.layers.items():
        kept = [loads[layer][old] for old in layer_plan.order]
        only_moves = not layer_plan.gone
        found: Placement = place(
            kept,
            num_ranks,
            method=rule.method,
            num_groups=num_groups,
            num_nodes=rule.nodes,
            current=list(range(len(kept))) if only_moves else None,
            tolerance=rule.tolerance if only_moves else None,
        )
        layers[layer] = moved = layer_plan.then(LayerPlan(experts_before=len(kept), order=found.order))
        placements[layer] = LayerPlacement(
            num_ranks=num_ranks,
            balance_before=balance(rank_loads(kept, range(len(kept)), num_ranks)),
            balance_after=found.balance,
            over_bound=found.over_bound,
            moved=_num_moved(moved, num_ranks),
        )
    return replace(plan, layers=layers), placements


def _num_moved(layer_plan: LayerPlan, num_ranks: int) -> int:
    """Experts that are on another rank than before."""
    before, after = layer_plan.experts_before // num_ranks, layer_plan.experts_after // num_ranks
    return sum(old // before != new // after for new, old in enumerate(layer_plan.order))


def settled(given: Rearrangement | bool | None, ep_size: int, counts: Mapping[int, int]) -> Rearrangement | None:
    """The rule with its number of ranks settled; None when experts keep their order.

    Raises:
        SecateurError: no number of ranks to place on, or experts that do not divide over them.
    """
    if given is False or (given is None and ep_size == 1):
        return None
    rule = given if isinstance(given, Rearrangement) else Rearrangement()
    ranks = rule.ranks or ep_size
    if ranks == 1:
        raise SecateurError("rearrange: the job has no expert parallelism; give the number of ranks to place on")
    if ep_size > 1 and ranks != ep_size:
        raise SecateurError(f"rearrange: {ranks} ranks given, but the job's expert-parallel size is {ep_size}")
    for layer, count in counts.items():
        if count % ranks:
            raise SecateurError(f"rearrange: layer {layer} has {count} experts, expected a multiple of {ranks} ranks")
    return replace(rule, ranks=ranks)


def nothing_dropped(counts: Mapping[int, int], stats: RouterStats) -> Plan:
    """The plan that a rearrangement between prunings starts from."""
    kept = Plan.identity(counts)
    return Plan(layers=kept.layers, criterion="placement", stats_digest=stats.digest())
