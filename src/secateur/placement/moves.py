"""How many experts change their rank, and the names of the ranks that let most of them stay.

Legend: E experts, R ranks. `homes` is (E,), the rank where each expert is now.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from secateur.placement.ranks import Ints, check_order


def num_moves(current: Sequence[int], order: Sequence[int], num_ranks: int) -> int:
    """Experts that stand on another rank in `order` than in `current` (order[new] = old). A rank is a fixed device.

    Raises:
        SecateurError: one of the two is not a permutation.
    """
    for one in (current, order):
        check_order(one, len(current))
    return int((ranks_of(current, num_ranks) != ranks_of(order, num_ranks)).sum())


def ranks_of(order: Sequence[int], num_ranks: int) -> Ints:
    """(E,) the rank of each expert."""
    ranks = np.empty(len(order), dtype=np.intp)
    ranks[np.asarray(order)] = np.arange(len(order)) // (len(order) // num_ranks)
    return ranks


def order_of(ranks: Ints) -> list[int]:
    """The order in which the experts stand on these ranks, ascending ids inside a rank."""
    order: list[int] = np.argsort(ranks, kind="stable").tolist()
    return order


def relabel(homes: Ints, ranks: Ints, num_ranks: int, num_nodes: int = 1) -> Ints:
    """(E,) the same ranks under other names, so that as many experts as possible stay at home.

    With several nodes, first on their node and then on their rank. Which experts stand together does not change.
    """
    if num_nodes > 1:
        size = num_ranks // num_nodes
        nodes = relabel(homes // size, ranks // size, num_nodes)
        ranks = nodes * size + ranks % size
        for node in range(num_nodes):
            inside = ranks // size == node
            ranks[inside] = node * size + _best_names(homes[inside] - node * size, ranks[inside] % size, size)
        return ranks
    return _best_names(homes, ranks, num_ranks)


def _best_names(homes: Ints, ranks: Ints, num_ranks: int) -> Ints:
    """`homes` outside 0 .. R - 1 are those of experts that cannot stay."""
    stay = np.zeros((num_ranks, num_ranks))
    local = (homes >= 0) & (homes < num_ranks)
    np.add.at(stay, (ranks[local], homes[local]), 1)
    _, names = linear_sum_assignment(stay, maximize=True)
    return np.asarray(names)[ranks]
