"""How many experts may a layer keep, in which order do they go, and what do all layers admit together?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from secateur.decide.laep_rule import exact, removal_order
from secateur.errors import SecateurError

Loads = Mapping[int, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class LayerLimits:
    """Which numbers of experts a layer may keep.

    Args:
        num_experts: E, experts before.
        multiple_of: the retained count is a multiple of this (the size of expert parallelism) ...
        num_groups: ... and of this: groups of E / num_groups consecutive ids, each keeping the same number.
            Keeping all E is admissible even where E is no multiple of `multiple_of`.
        min_experts: the floor.
        max_experts: the cap. It is an order: experts go until it is met, whatever the rule says.

    Raises:
        SecateurError: a number out of range, or no count that all of this allows.
    """

    num_experts: int
    multiple_of: int = 1
    min_experts: int = 1
    max_experts: int | None = None
    num_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("num_experts", "multiple_of", "min_experts", "max_experts", "num_groups"):
            value = getattr(self, name)
            if name == "max_experts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SecateurError(f"{name} is {value!r}, expected an integer of 1 or more")
        if self.min_experts > self.num_experts:
            raise SecateurError(f"min_experts is {self.min_experts}, but the layer has only {self.num_experts} experts")
        if self.max_experts is not None and self.max_experts < self.min_experts:
            raise SecateurError(f"max_experts is {self.max_experts}, expected at least min_experts, {self.min_experts}")
        if self.num_experts % self.num_groups:
            raise SecateurError(f"num_groups is {self.num_groups}, which does not divide {self.num_experts} experts")
        if not self.counts():
            raise SecateurError(f"no number of experts can be kept under {self.describe()}")

    def counts(self) -> list[int]:
        """The retained counts that are admissible, ascending."""
        step = math.lcm(self.multiple_of, self.num_groups)
        most = min(self.num_experts, self.max_experts or self.num_experts)
        first = -(-self.min_experts // step) * step
        counts = list(range(first, most + 1, step))
        return counts if most < self.num_experts or most in counts else [*counts, most]

    def describe(self) -> str:
        return (
            f"num_experts={self.num_experts}, multiple_of={self.multiple_of}, num_groups={self.num_groups}, "
            f"min_experts={self.min_experts}, max_experts={self.max_experts}"
        )


Limits = Mapping[int, LayerLimits]


def check_share(name: str, value: float) -> Fraction:
    """`value` as typed, when it is above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise SecateurError(f"{name} is {value!r}, expected a share above 0 and below 1")
    return exact(value)


def limits_of(
    num_experts: Mapping[int, int],
    *,
    num_groups: int,
    least: int,
    multiple_of: int = 1,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> dict[int, LayerLimits]:
    """The limits of every layer of a model.

    Args:
        num_experts: {layer: E}. num_groups, least: of its routers: their groups, and the fewest experts they work with.
        multiple_of, min_experts, max_experts: what is asked for; see `LayerLimits`.
    """
    return {
        layer: LayerLimits(
            num_experts=experts,
            multiple_of=multiple_of,
            min_experts=max(least, min_experts, multiple_of),
            max_experts=max_experts,
            num_groups=num_groups,
        )
        for layer, experts in num_experts.items()
    }


def removal_by_group(values: Sequence[float], num_groups: int, protected: Collection[int] = ()) -> list[list[int]]:
    """The expert ids of each router group in the order they would go: lowest value first, protected ones last."""
    size = len(values) // num_groups
    order = sorted(removal_order(values), key=lambda expert: expert in protected)
    return [[expert for expert in order if expert // size == group] for group in range(num_groups)]


def common_counts(limits: Limits) -> list[int]:
    """The retained counts that every layer admits, ascending."""
    common = sorted(set.intersection(*(set(layer_limits.counts()) for layer_limits in limits.values())))
    if not common:
        found = {layer: layer_limits.counts() for layer, layer_limits in limits.items()}
        raise SecateurError(f"uniform: no number of experts is admissible in every layer: {found}")
    return common
