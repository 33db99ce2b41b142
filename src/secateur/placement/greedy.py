"""LAEP's rearrangement: the busiest expert first, to the idlest rank with room (arXiv 2601.14327)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from secateur.placement.ranks import experts_per_rank


def greedy_with_room(loads: Sequence[float], num_ranks: int) -> list[int]:
    """The order of the experts that levels the ranks: busiest expert first, to the idlest rank with room.

    Ties go to the lower expert id and the lower rank. With two experts a rank it is the best order there is (the
    busiest expert beside the idlest one); with more it is near the best, not always at it.

    Args:
        loads: (E,) tokens per expert.
        num_ranks: R, a divisor of E.

    Returns:
        (E,) order[new] = old; ascending old ids inside a rank.

    Raises:
        SecateurError: no expert, a load that is not from 0 to 2**53, or R that is not a divisor of E.
    """
    capacity = experts_per_rank(loads, num_ranks)
    return [expert for block in greedy_blocks(loads, num_ranks, capacity) for expert in sorted(block)]


def greedy_blocks(loads: Sequence[float], num_ranks: int, capacity: int) -> list[list[int]]:
    """(R, C) the experts of each rank, busiest first. Unchecked."""
    blocks: list[list[int]] = [[] for _ in range(num_ranks)]
    with_room = [(0.0, rank) for rank in range(num_ranks)]  # a heap
    for expert in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
        total, rank = with_room[0]
        block = blocks[rank]
        block.append(expert)
        if len(block) < capacity:
            heapq.heapreplace(with_room, (total + loads[expert], rank))
        else:
            heapq.heappop(with_room)
    return blocks
