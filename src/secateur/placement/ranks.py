"""How the experts of a layer stand on expert-parallel ranks, and how level the ranks are.

Legend: E experts, R ranks, C = E / R experts a rank. Rank r owns the block r*C .. (r+1)*C - 1 of the order, which is
how every engine shards experts. LAEP: arXiv 2601.14327.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import SecateurError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

LARGEST_LOAD = 2**53  # up to here every whole number is a float


@dataclass(frozen=True, kw_only=True)
class Solved:
    """An order of the experts (order[new] = old), and a load that the busiest rank has in every order."""

    order: list[int]
    lower_bound: float


def rank_loads(loads: Sequence[float], order: Sequence[int], num_ranks: int) -> list[float]:
    """(R,) tokens that each rank receives when the experts stand in `order` (order[new] = old).

    Raises:
        SecateurError: as `experts_per_rank`, or `order` is not a permutation of the experts.
    """
    capacity = experts_per_rank(loads, num_ranks)
    check_order(order, len(loads))
    return [
        sum(loads[expert] for expert in order[start : start + capacity]) for start in range(0, len(loads), capacity)
    ]


def busiest_rank_lower_bound(loads: Sequence[float], num_ranks: int) -> float:
    """The load that the busiest rank has in every order: max(S / R, largest load + sum of the C - 1 smallest).

    Raises:
        SecateurError: as `experts_per_rank`.
    """
    capacity = experts_per_rank(loads, num_ranks)
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


def experts_per_rank(loads: Sequence[float], num_ranks: int) -> int:
    """C.

    Raises:
        SecateurError: no expert, a load that is not from 0 to 2**53, or R that is not a divisor of E.
    """
    if not len(loads):
        raise SecateurError("loads are empty, expected one number for each expert")
    for expert, load in enumerate(loads):
        if not 0 <= load <= LARGEST_LOAD:
            raise SecateurError(f"load of expert {expert} is {load}, expected a number from 0 to 2**53")
    if num_ranks < 1:
        raise SecateurError(f"num_ranks is {num_ranks}, expected at least 1")
    if len(loads) % num_ranks:
        raise SecateurError(f"{len(loads)} experts do not divide over {num_ranks} ranks, expected a multiple")
    return len(loads) // num_ranks


def check_order(order: Sequence[int], num_experts: int) -> None:
    """Raises SecateurError when `order` does not list each expert once."""
    if sorted(order) != list(range(num_experts)):
        raise SecateurError(f"order is {list(order)}, expected each expert id from 0 to {num_experts - 1} once")
