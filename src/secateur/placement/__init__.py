"""Which expert-parallel rank holds which expert, and how even is that?

LAEP's rearrangement, better orders, and how good they are. Pure functions: loads (E,) in, order[new] = old out. Ranks
own contiguous blocks, so a placement is a permutation of expert ids, the same for the router rows and every other
per-expert tensor, and the function of the model is unchanged.
"""

from secateur.placement.greedy import greedy_with_room
from secateur.placement.milp import exact
from secateur.placement.moves import num_moves
from secateur.placement.one_layer import METHODS, Placement, place
from secateur.placement.ranks import balance, busiest_rank_lower_bound, rank_loads
from secateur.placement.swaps import greedy_with_swaps, level_ranks

__all__ = [
    "METHODS",
    "Placement",
    "balance",
    "busiest_rank_lower_bound",
    "exact",
    "greedy_with_room",
    "greedy_with_swaps",
    "level_ranks",
    "num_moves",
    "place",
    "rank_loads",
]
