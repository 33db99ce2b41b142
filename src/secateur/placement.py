"""Which expert-parallel rank holds which expert: LAEP's rearrangement and how good it is.

Legend: E experts, R ranks, C = E / R experts a rank. Rank r owns the block r*C .. (r+1)*C - 1 of the order, which is
how every engine shards experts. LAEP: arXiv 2601.14327.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.errors import SecateurError


def greedy_with_room(loads: Sequence[float], num_ranks: int) -> list[int]:
    """The order of the experts that levels the ranks: busiest expert first, to the idlest rank with room.

    Ties go to the lower expert id and the lower rank. Greedy is near the best order, not always at it.

    Args:
        loads: (E,) tokens per expert.
        num_ranks: R, a divisor of E.

    Returns:
        (E,) order[new] = old; ascending old ids inside a rank.

    Raises:
        SecateurError: no expert, a load that is negative or not finite, or R that is not a divisor of E.
    """
    capacity = _experts_per_rank(loads, num_ranks)
    totals = [0.0] * num_ranks
    blocks: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert)):
        with_room = (rank for rank in range(num_ranks) if len(blocks[rank]) < capacity)
        rank = min(with_room, key=totals.__getitem__)
        blocks[rank].append(expert)
        totals[rank] += loads[expert]
    return [expert for block in blocks for expert in sorted(block)]


def rank_loads(loads: Sequence[float], order: Sequence[int], num_ranks: int) -> list[float]:
    """(R,) tokens that each rank receives when the experts stand in `order` (order[new] = old).

    Raises:
        SecateurError: as `greedy_with_room`, or `order` is not a permutation of the experts.
    """
    capacity = _experts_per_rank(loads, num_ranks)
    if sorted(order) != list(range(len(loads))):
        raise SecateurError(f"order is {list(order)}, expected each expert id from 0 to {len(loads) - 1} once")
    return [
        sum(loads[expert] for expert in order[start : start + capacity]) for start in range(0, len(loads), capacity)
    ]


def busiest_rank_lower_bound(loads: Sequence[float], num_ranks: int) -> float:
    """The load that the busiest rank has in every order: max(S / R, largest load + sum of the C - 1 smallest).

    Raises:
        SecateurError: as `greedy_with_room`.
    """
    capacity = _experts_per_rank(loads, num_ranks)
    ascending = sorted(loads)
    return max(sum(ascending) / num_ranks, ascending[-1] + sum(ascending[: capacity - 1]))


def balance(rank_loads: Sequence[float]) -> float:
    """Load of the busiest rank over the mean load: 1 is level, R is everything on one rank.

    Raises:
        SecateurError: no rank, or no load at all: the ratio has no value.
    """
    if not rank_loads or not sum(rank_loads) > 0:
        raise SecateurError(f"rank loads are {list(rank_loads)}, expected at least one rank with a load above 0")
    return max(rank_loads) * len(rank_loads) / sum(rank_loads)


def _experts_per_rank(loads: Sequence[float], num_ranks: int) -> int:
    if not loads:
        raise SecateurError("loads are empty, expected one number for each expert")
    for expert, load in enumerate(loads):
        if not math.isfinite(load) or load < 0:
            raise SecateurError(f"load of expert {expert} is {load}, expected a finite number of at least 0")
    if num_ranks < 1:
        raise SecateurError(f"num_ranks is {num_ranks}, expected at least 1")
    if len(loads) % num_ranks:
        raise SecateurError(f"{len(loads)} experts do not divide over {num_ranks} ranks, expected a multiple")
    return len(loads) // num_ranks
