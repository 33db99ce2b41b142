"""When has the load of the experts settled? The stable phase of LAEP (arXiv 2601.14327 describes it, without a test).

Our reading: cut training into windows and compare the loads of each window with those of the window before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from secateur.decide.laep_rule import check_loads, exact
from secateur.errors import SecateurError
from secateur.files.records import Count, Layer, as_record

FORMAT = "secateur-phase-detector"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PhaseConstants:
    """What counts as stable.

    Args:
        windows: m, at least 2. A layer is stable when all m - 1 comparisons of consecutive windows among the last m
            windows hold.
        min_rank_correlation: a comparison holds when the Spearman correlation of the two loads is at least this ...
        max_total_variation: ... and the total variation distance of their shares is at most this.
        min_stable_layers: the run is stable when at least this share of its layers is.

    Raises:
        SecateurError: a value out of range.
    """

    windows: int = 3
    min_rank_correlation: float = 0.97
    max_total_variation: float = 0.05
    min_stable_layers: float = 0.95

    def __post_init__(self) -> None:
        if isinstance(self.windows, bool) or not isinstance(self.windows, int) or self.windows < 2:
            raise SecateurError(f"windows is {self.windows!r}, expected an integer of 2 or more")
        for name, low in (("min_rank_correlation", -1), ("max_total_variation", 0), ("min_stable_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
                raise SecateurError(f"{name} is {value!r}, expected a number from {low} to 1")
        if self.min_stable_layers == 0:
            raise SecateurError("min_stable_layers is 0, expected more: every window would count as stable")


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """The state of the run after a window; the two dicts are {layer: comparison with the window before}, empty at the
    first window."""

    stable: bool
    stable_share: float
    rank_correlation: dict[int, float]
    total_variation: dict[int, float]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, from -1 to 1; equal values share the average of their ranks.

    Where it is undefined: 1.0 if both vectors are constant (nothing changed its rank), 0.0 if only one is.

    Raises:
        SecateurError: the vectors are empty or of different length.
    """
    _check_lengths(a, b)
    ranks_a, ranks_b = _doubled_ranks(a), _doubled_ranks(b)
    # Doubled ranks are integers with mean len + 1, so the sums are exact.
    mean = len(a) + 1
    spread_a = sum((rank - mean) ** 2 for rank in ranks_a)
    spread_b = sum((rank - mean) ** 2 for rank in ranks_b)
    if not spread_a or not spread_b:
        return 1.0 if spread_a == spread_b else 0.0
    common = sum((left - mean) * (right - mean) for left, right in zip(ranks_a, ranks_b, strict=True))
    return max(-1.0, min(1.0, common / math.sqrt(spread_a * spread_b)))


def total_variation(a: Sequence[int], b: Sequence[int]) -> float:
    """Half the summed difference of the shares of two loads: 0 for equal shares, 1 for disjoint ones.

    Raises:
        SecateurError: different lengths, a negative load, or no token in one of them.
    """
    _check_lengths(a, b)
    check_loads(a, "first load")
    check_loads(b, "second load")
    total_a, total_b = sum(a), sum(b)
    return sum(abs(x * total_b - y * total_a) for x, y in zip(a, b, strict=True)) / (2 * total_a * total_b)


class StablePhaseDetector:
    """Takes the loads of one window after another and says when the run has become stable."""

    def __init__(self, constants: PhaseConstants | None = None) -> None:
        self.constants = constants or PhaseConstants()
        self.reset()

    def reset(self) -> None:
        """Forget all windows, as after a pruning."""
        self._previous: dict[int, list[int]] = {}
        self._streak: dict[int, int] = {}

    def reorder(self, orders: Mapping[int, Sequence[int]]) -> None:
        """Follow experts to their new places, {layer: order[new] = old}; nothing else about the loads has changed."""
        for layer, order in orders.items():
            if layer in self._previous:
                self._previous[layer] = [self._previous[layer][old] for old in order]

    def update(self, loads: Mapping[int, Sequence[int]]) -> PhaseReport:
        """Add a window: {layer: tokens of each expert}.

        Raises:
            SecateurError: a layer without a token, or other layers or expert counts than in the window before without
                a `reset` between. The detector is unchanged then.
        """
        self._check(loads)
        correlation, distance = {}, {}
        for layer, before in self._previous.items():
            correlation[layer] = spearman(before, loads[layer])
            distance[layer] = total_variation(before, loads[layer])
            holds = (
                correlation[layer] >= self.constants.min_rank_correlation
                and distance[layer] <= self.constants.max_total_variation
            )
            self._streak[layer] = self._streak.get(layer, 0) + 1 if holds else 0
        self._previous = {layer: [int(load) for load in loads[layer]] for layer in sorted(loads)}
        num_stable = sum(count >= self.constants.windows - 1 for count in self._streak.values())
        return PhaseReport(
            stable=num_stable >= exact(self.constants.min_stable_layers) * len(loads),
            stable_share=num_stable / len(loads),
            rank_correlation=correlation,
            total_variation=distance,
        )

    def _check(self, loads: Mapping[int, Sequence[int]]) -> None:
        if not loads:
            raise SecateurError("window: no layer, expected at least one")
        for layer, counts in loads.items():
            check_loads(counts, f"window, layer {layer}")
        sizes = {layer: len(counts) for layer, counts in loads.items()}
        before = {layer: len(counts) for layer, counts in self._previous.items()}
        if before and sizes != before:
            changed = sorted({layer for layer, _ in sizes.items() ^ before.items()})
            raise SecateurError(
                f"window: layers {changed} have {[sizes.get(layer, 0) for layer in changed]} experts, but "
                f"{[before.get(layer, 0) for layer in changed]} in the window before; reset the detector after a change"
            )

    def state(self) -> dict[str, Any]:
        """All that the next `update` depends on, as JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "constants": asdict(self.constants),
            "previous": {str(layer): list(counts) for layer, counts in self._previous.items()},
            "streak": {str(layer): count for layer, count in self._streak.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            SecateurError: the state is of another format, or of a detector with other constants.
        """
        saved = as_record(state, DetectorState, "phase detector")
        if saved.constants != asdict(self.constants):
            raise SecateurError(
                f"phase detector: the saved constants are {saved.constants}, but this run uses {asdict(self.constants)}"
            )
        self._previous, self._streak = saved.previous, saved.streak


class DetectorState(msgspec.Struct, frozen=True, kw_only=True):
    """What `StablePhaseDetector.state` gives."""

    format: Literal["secateur-phase-detector"]
    version: Literal[1]
    constants: dict[str, Any]
    previous: dict[Layer, list[Count]]
    streak: dict[Layer, Count]


def _check_lengths(a: Sequence[float], b: Sequence[float]) -> None:
    if not a or len(a) != len(b):
        raise SecateurError(f"loads of {len(a)} and of {len(b)} experts cannot be compared, expected equal numbers")


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value, counted from 1; equal values share the average."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranks[index] = start + 1 + stop
        start = stop
    return ranks
