"""One front door: loads of a layer in, a placement out, with how good it is and how many experts it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import SecateurError
from secateur.placement.few_moves import few_moves
from secateur.placement.greedy import greedy_with_room
from secateur.placement.milp import exact
from secateur.placement.moves import order_of, ranks_of, relabel
from secateur.placement.ranks import (
    Floats,
    Ints,
    Solved,
    balance,
    busiest_rank_lower_bound,
    check_order,
    experts_per_rank,
    rank_loads,
)
from secateur.placement.swaps import greedy_with_swaps

Method = Callable[[Sequence[float], int], Solved]


def _with_bound(find: Callable[[Sequence[float], int], list[int]]) -> Method:
    return lambda loads, num_ranks: Solved(
        order=find(loads, num_ranks), lower_bound=busiest_rank_lower_bound(loads, num_ranks)
    )


METHODS: dict[str, Method] = {
    "swaps": _with_bound(greedy_with_swaps),
    "greedy": _with_bound(greedy_with_room),
    "exact": exact,
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The experts of one layer on R ranks.

    order: (E,) order[new] = old; rank r owns the block r*C .. (r+1)*C - 1. rank_loads: (R,) tokens. balance: busiest
    rank over the mean. lower_bound: tokens that the busiest rank has in every order that is allowed. over_bound: tokens
    of the busiest rank over that bound; 1 is proven to be the best. moved: experts that change their rank.
    """

    order: tuple[int, ...]
    rank_loads: tuple[float, ...]
    balance: float
    lower_bound: float
    over_bound: float
    moved: int


def place(
    loads: Sequence[float],
    num_ranks: int,
    *,
    method: str = "swaps",
    num_groups: int = 1,
    num_nodes: int = 1,
    current: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> Placement:
    """Place the experts of one layer on expert-parallel ranks.

    Ranks that are interchangeable are named so that few experts move, and experts stay where they are when the order
    found is not more level than the current one.

    Args:
        loads: (E,) tokens per expert.
        num_ranks: R, a divisor of E.
        method: a name of `METHODS`.
        num_groups: G, router groups of E / G consecutive ids. Experts change places inside their group only, and
            groups stay in their order: routers pick groups by position. So R must be a multiple of G (each group has
            ranks of its own) or G a multiple of R (each rank holds whole groups, and no expert can move).
        num_nodes: N, a divisor of R. The nodes (R / N consecutive ranks each) are levelled first, then the ranks
            inside each; this keeps the traffic between nodes level at some cost to the ranks. With groups, N must be
            a multiple of G or G one of N.
        current: (E,) the order the experts stand in now, ascending ids if None.
        tolerance: move few experts only, as long as no rank (and no node) gets more than 1 + tolerance times what the
            busiest would have otherwise.

    Raises:
        SecateurError: unusable loads, no load at all, an unknown method, numbers that do not divide as above, or
            `current` that is no permutation within the groups.
    """
    num_experts = len(loads)
    experts_per_rank(loads, num_ranks)
    if method not in METHODS:
        raise SecateurError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise SecateurError(f"tolerance is {tolerance}, expected a number of at least 0")
    now = list(range(num_experts)) if current is None else list(current)
    check_order(now, num_experts)
    ranks_each, nodes_each = _split(num_experts, num_ranks, num_groups, num_nodes)
    size = num_experts // num_groups
    if any(expert // size != position // size for position, expert in enumerate(now)):
        raise SecateurError(f"the current order takes experts out of their router groups of {size}")

    homes = ranks_of(now, num_ranks)
    if not ranks_each:
        return _placement(loads, now, homes, homes, num_ranks, lower_bound=max(rank_loads(loads, now, num_ranks)))
    values = np.asarray(loads, dtype=np.float64)
    groups = [slice(start, start + size) for start in range(0, num_experts, size)]
    first_ranks = range(0, num_ranks, ranks_each)
    full = np.empty(num_experts, dtype=np.intp)
    lower_bound = 0.0
    for group, first in zip(groups, first_ranks, strict=True):
        solved = _filled(loads[group], ranks_each, nodes_each, METHODS[method])
        lower_bound = max(lower_bound, solved.lower_bound)
        own = ranks_of(solved.order, ranks_each)
        full[group] = first + relabel(homes[group] - first, own, ranks_each, nodes_each)
    if _busiest(values, homes, num_ranks, num_nodes) <= _busiest(values, full, num_ranks, num_nodes):
        return _placement(loads, now, homes, homes, num_ranks, lower_bound=lower_bound)
    if tolerance is None:
        return _placement(loads, now, homes, full, num_ranks, lower_bound=lower_bound)
    node, rank = ((1 + tolerance) * load for load in _busiest(values, full, num_ranks, num_nodes))
    limits = {ranks_each: rank} if nodes_each == 1 else {nodes_each: node, ranks_each: rank}
    few = np.empty_like(full)
    for group, first in zip(groups, first_ranks, strict=True):
        few[group] = first + few_moves(values[group], homes[group] - first, full[group] - first, limits)
    return _placement(loads, now, homes, few, num_ranks, lower_bound=lower_bound)


def _split(num_experts: int, num_ranks: int, num_groups: int, num_nodes: int) -> tuple[int, int]:
    """Ranks and nodes of each group; 0 ranks where a rank holds whole groups, so that nothing can move."""
    if num_groups < 1 or num_experts % num_groups:
        raise SecateurError(f"{num_experts} experts do not divide over {num_groups} router groups, expected a multiple")
    if num_nodes < 1 or num_ranks % num_nodes:
        raise SecateurError(f"{num_ranks} ranks do not divide over {num_nodes} nodes, expected a multiple")
    if num_groups % num_ranks == 0:
        return 0, 1
    if num_ranks % num_groups:
        raise SecateurError(
            f"{num_ranks} ranks and {num_groups} router groups: experts stay in their group, so the one must be a "
            "multiple of the other"
        )
    if num_groups % num_nodes == 0:
        return num_ranks // num_groups, 1
    if num_nodes % num_groups:
        raise SecateurError(
            f"{num_nodes} nodes and {num_groups} router groups: experts stay in their group, so the one must be a "
            "multiple of the other"
        )
    return num_ranks // num_groups, num_nodes // num_groups


def _filled(loads: Sequence[float], num_ranks: int, num_nodes: int, method: Method) -> Solved:
    """Level the nodes, then the ranks of each."""
    if num_nodes == 1:
        return method(loads, num_ranks)
    nodes = method(loads, num_nodes).order
    size = len(loads) // num_nodes
    order = []
    for start in range(0, len(loads), size):
        experts = nodes[start : start + size]
        inside = method([loads[expert] for expert in experts], num_ranks // num_nodes).order
        order += [experts[index] for index in inside]
    return Solved(order=order, lower_bound=busiest_rank_lower_bound(loads, num_ranks))


def _busiest(loads: Floats, ranks: Ints, num_ranks: int, num_nodes: int) -> tuple[float, float]:
    """The load of the busiest node, and of the busiest rank."""
    nodes = ranks // (num_ranks // num_nodes)
    return float(np.bincount(nodes, loads).max()), float(np.bincount(ranks, loads).max())


def _placement(
    loads: Sequence[float], current: list[int], homes: Ints, ranks: Ints, num_ranks: int, *, lower_bound: float
) -> Placement:
    moved = int((ranks != homes).sum())
    order = order_of(ranks) if moved else current
    on_ranks = rank_loads(loads, order, num_ranks)
    return Placement(
        order=tuple(order),
        rank_loads=tuple(on_ranks),
        balance=balance(on_ranks),
        lower_bound=lower_bound,
        over_bound=max(on_ranks) / lower_bound,
        moved=moved,
    )
