"""What does each number of experts that a layer may keep save, and what does it cost?

Going down a level drops the experts of lowest value, the same number in each router group; protected ones go last.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from secateur.decide.limits import LayerLimits, Limits, removal_by_group


class Level(NamedTuple):
    """One admissible number of experts of a layer: what is kept, saved by dropping the rest, and lost with it."""

    kept: int
    saving: int
    cost: int


Levels = Mapping[int, Sequence[Level]]  # of each layer, keeping most first


def levels_of(
    limits: LayerLimits,
    *,
    values: Sequence[float],
    costs: Sequence[int],
    size: int,
    protected: Collection[int] = (),
) -> list[Level]:
    """The levels of one layer, keeping most first.

    Args:
        values: (E,) what the experts are ranked by. costs: (E,) what is lost with each. size: what dropping one saves.
    """
    rounds = zip(*removal_by_group(values, limits.num_groups, protected), strict=True)
    dropped = [0, *itertools.accumulate(sum(costs[expert] for expert in ids) for ids in rounds)]
    gone = [(count, limits.num_experts - count) for count in reversed(limits.counts())]
    return [Level(count, experts * size, dropped[experts // limits.num_groups]) for count, experts in gone]


def kept_experts(
    limits: LayerLimits, count: int, *, values: Sequence[float], protected: Collection[int] = ()
) -> tuple[int, ...]:
    """The ids that stay when a layer keeps `count` experts, ascending."""
    dropped = (limits.num_experts - count) // limits.num_groups
    groups = removal_by_group(values, limits.num_groups, protected)
    return tuple(sorted(expert for group in groups for expert in group[dropped:]))


def rounded_up(limits: Limits, wanted: Mapping[int, int]) -> dict[int, int]:
    """{layer: the smallest admissible number that is at least the one wanted, or the largest there is}."""
    levels = {layer: layer_limits.counts() for layer, layer_limits in limits.items()}
    return {
        layer: next((count for count in counts if count >= wanted[layer]), counts[-1])
        for layer, counts in levels.items()
    }


def savings_and_costs(levels: Levels) -> list[list[tuple[int, int]]]:
    """What `knapsack` chooses from."""
    return [[(level.saving, level.cost) for level in of_layer] for of_layer in levels.values()]


def counts_at(levels: Levels, chosen: Sequence[int] | None) -> dict[int, int] | None:
    """{layer: experts kept at the level with the chosen index}; None for None, where nothing can be chosen."""
    if chosen is None:
        return None
    return {layer: levels[layer][index].kept for layer, index in zip(levels, chosen, strict=True)}


def fewest(limits: Limits) -> dict[int, int]:
    """{layer: the fewest experts that it may keep}."""
    return {layer: layer_limits.counts()[0] for layer, layer_limits in limits.items()}


def saved(limits: Limits, counts: Mapping[int, int], sizes: Mapping[int, int]) -> int:
    """What keeping `counts` saves in all layers, dropping one expert of a layer saving its size."""
    return sum((limits[layer].num_experts - count) * sizes[layer] for layer, count in counts.items())
