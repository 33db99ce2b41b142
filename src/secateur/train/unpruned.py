"""What a pruning that has not come would do now, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Unpruned:
    """A pruning of the schedule that has not come.

    step: of the run. waits_for: the phase in words, or the fixed time. dropped: {layer: ids of the experts that would
    go by the last loads}; None where no window is full yet. rerouted_share: of all
    routed tokens.
    """

    step: int
    waits_for: str
    dropped: Mapping[int, tuple[int, ...]] | None = None
    rerouted_share: float | None = None

    def describe(self) -> str:
        """One line for a log."""
        line = f"not pruned up to step {self.step}: {self.waits_for}"
        if self.dropped is None or self.rerouted_share is None:
            return f"{line}; there are no loads yet to choose by"
        count = sum(len(experts) for experts in self.dropped.values())
        layers = "; ".join(f"layer {n}: {' '.join(map(str, ids))}" for n, ids in self.dropped.items() if ids)
        return f"{line}. Now {count} experts would go, with {self.rerouted_share:.2%} of the routed tokens: {layers}"

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        dropped = None if self.dropped is None else {str(n): list(ids) for n, ids in self.dropped.items()}
        return {
            "step": self.step,
            "waits_for": self.waits_for,
            "dropped": dropped,
            "rerouted_share": self.rerouted_share,
        }
