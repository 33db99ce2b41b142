"""Level the ranks by moving few experts, for a bounded loss of balance.

Legend: E experts, R ranks, N nodes of R / N ranks. `homes` is (E,), the rank where each expert is now.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.placement.ranks import Floats, Ints


def few_moves(loads: Floats, homes: Ints, full: Ints, limits: Mapping[int, float]) -> Ints:
    """(E,) ranks with few experts away from home within the limits.

    Two ways, the better one counts: swaps from home until the limits hold, and `full` with experts swapped back home.
    Both are heuristics: near the fewest moves, not proven to be the fewest.

    Args:
        homes, full: (E,) the ranks now, and ranks that keep the limits.
        limits: {R: what a rank may receive} and, with nodes, {N: what a node may receive}.
    """
    num_ranks = max(limits)
    found = [_go_home(loads, homes, full, limits)]
    relieved = _relieved(loads, homes, limits)
    if relieved is not None:
        found.append(_go_home(loads, homes, relieved, limits))
    return min(found, key=lambda ranks: ((ranks != homes).sum(), np.bincount(ranks, loads, num_ranks).max()))


def _relieved(loads: Floats, homes: Ints, limits: Mapping[int, float]) -> Ints | None:
    """Swaps from home: between nodes first, then between the ranks of each node. None if they end above a limit."""
    num_nodes, num_ranks = min(limits) if len(limits) > 1 else 1, max(limits)
    size = num_ranks // num_nodes
    ranks = homes.copy()
    if num_nodes > 1 and not _relieve_(loads, ranks, ranks // size, homes // size, limits[num_nodes]):
        return None
    for node in range(num_nodes):
        inside = np.flatnonzero(ranks // size == node)
        own = ranks[inside]
        if not _relieve_(loads[inside], own, own.copy(), homes[inside], limits[num_ranks]):
            return None
        ranks[inside] = own
    return ranks


def _relieve_(loads: Floats, ranks: Ints, parts: Ints, homes: Ints, limit: float) -> bool:
    """Swap the ranks of two experts, as long as the busiest part is above the limit and a swap relieves it.

    Args:
        ranks, parts, homes: (E,) the rank, the part (a rank or a node) and the part at home of each expert. Parts are
            what is levelled; both change in place.
    """
    totals = np.bincount(parts, loads)
    while totals.max() > limit:
        busiest = int(totals.argmax())
        givers, takers = np.flatnonzero(parts == busiest), np.flatnonzero(parts != busiest)
        if not len(takers):
            return False
        less = loads[givers][:, None] - loads[takers]
        worst = np.maximum(totals[busiest] - less, totals[parts[takers]] + less)
        if not worst.min() < totals[busiest]:
            return False
        leave_home = (homes[givers] == busiest)[:, None] + (homes[takers] == parts[takers]).astype(int)
        leave_home -= (homes[givers][:, None] == parts[takers]) + (homes[takers] == busiest).astype(int)
        giver, taker = _first(np.maximum(worst, limit), leave_home, worst)
        one, other = givers[giver], takers[taker]
        _swap_(ranks, one, other)
        _swap_(parts, one, other)
        totals = np.bincount(parts, loads)
    return True


def _first(*keys: Floats | Ints) -> tuple[int, int]:
    """Where the first table is least; among those, where the second is, and so on."""
    index = np.lexsort([key.ravel() for key in reversed(keys)])[0]
    row, column = np.unravel_index(index, keys[0].shape)
    return int(row), int(column)


def _swap_(values: Ints, one: int, other: int) -> None:
    values[[one, other]] = values[[other, one]]


def _go_home(loads: Floats, homes: Ints, ranks: Ints, limits: Mapping[int, float]) -> Ints:
    """Swap experts back to their rank in place of others that are not at home there, as long as the limits hold."""
    num_ranks = max(limits)
    ranks = ranks.copy()
    while True:
        away = np.flatnonzero(ranks != homes)
        if not len(away):
            return ranks
        there = ranks[away] == homes[away][:, None]  # [one, other]: the other stands where the one belongs
        for parts, limit in limits.items():
            parts_of = ranks[away] // (num_ranks // parts)
            totals = np.bincount(ranks // (num_ranks // parts), loads)[parts_of]
            more = np.where(parts_of[:, None] == parts_of, 0, loads[away] - loads[away][:, None])
            there &= (totals[:, None] + more <= limit) & (totals - more <= limit)
        if not there.any():
            return ranks
        one, other = np.argwhere(there)[0]
        _swap_(ranks, away[one], away[other])
