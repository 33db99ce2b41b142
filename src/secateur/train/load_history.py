"""The loads of a run since its begin, or since its last pruning, in bounded memory.

What is kept are running sums at marks: the ends of windows, thinned as the run grows, so that between half of MOST and
MOST of them are evenly spread over it. The loads between any two marks are a difference.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from secateur.decide.laep_rule import check_loads
from secateur.errors import SecateurError
from secateur.files.records import Count, Layer, Positive, as_record

MOST = 64

Loads = dict[int, list[int]]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The end of a window. tokens: seen until then; sums: routed to each expert until then, {layer: (E,)}."""

    windows: int
    tokens: int
    sums: Loads


class LoadHistory:
    """Windows of loads, the oldest ones joined to longer and longer windows."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self._stride = 1

    @property
    def num_windows(self) -> int:
        return self.marks[-1].windows if self.marks else 0

    @property
    def num_tokens(self) -> int:
        return self.marks[-1].tokens if self.marks else 0

    def clear(self) -> None:
        """Forget all windows, as after a pruning."""
        self.marks, self._stride = [], 1

    def add(self, loads: Mapping[int, Sequence[int]], num_tokens: int) -> None:
        """One more window: {layer: tokens of each expert}, and how many tokens it had.

        Raises:
            SecateurError: a layer without a token, or other layers or expert counts than in the windows before. Nothing
                was added then.
        """
        self._check(loads, num_tokens)
        if not self.marks:
            self.marks = [Mark(windows=0, tokens=0, sums={layer: [0] * len(loads[layer]) for layer in sorted(loads)})]
        last = self.marks[-1]
        if last.windows > 1 and last.windows % self._stride:
            self.marks.pop()
        sums = {layer: [a + int(b) for a, b in zip(last.sums[layer], loads[layer], strict=True)] for layer in last.sums}
        self.marks.append(Mark(windows=last.windows + 1, tokens=last.tokens + num_tokens, sums=sums))
        while len(self.marks) > MOST:
            self._stride *= 2
            newest = self.marks[-1]
            self.marks = [m for m in self.marks if m.windows < 2 or m.windows % self._stride == 0 or m is newest]

    def between(self, first: Mark, last: Mark) -> Loads:
        """{layer: tokens of each expert} in the windows after `first` up to `last`."""
        return {
            layer: [b - a for a, b in zip(first.sums[layer], sums, strict=True)] for layer, sums in last.sums.items()
        }

    def mark_at(self, tokens: float) -> int:
        """The index of the last mark at which at most so many tokens had been seen."""
        return max(0, bisect_right(self.marks, tokens, key=lambda mark: mark.tokens) - 1)

    def reorder(self, orders: Mapping[int, Sequence[int]]) -> None:
        """Follow experts to their new places, {layer: order[new] = old}; nothing else about the loads has changed."""
        for mark in self.marks:
            for layer, order in orders.items():
                mark.sums[layer] = [mark.sums[layer][old] for old in order]

    def state(self) -> dict[str, Any]:
        """All that is kept, as JSON."""
        marks = [
            {"windows": mark.windows, "tokens": mark.tokens, "sums": {str(layer): s for layer, s in mark.sums.items()}}
            for mark in self.marks
        ]
        return {"stride": self._stride, "marks": marks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            SecateurError: it is damaged. Nothing was changed.
        """
        saved = as_record(state, HistoryState, "load history")
        sizes = [{layer: len(sums) for layer, sums in mark.sums.items()} for mark in saved.marks]
        order = [(mark.windows, mark.tokens) for mark in saved.marks]
        if any(one != sizes[0] for one in sizes) or order != sorted(order) or (order and order[0] != (0, 0)):
            raise SecateurError("load history: its marks are not those of one run in order")
        self.marks = [
            Mark(windows=one.windows, tokens=one.tokens, sums={k: one.sums[k] for k in sorted(one.sums)})
            for one in saved.marks
        ]
        self._stride = saved.stride

    def _check(self, loads: Mapping[int, Sequence[int]], num_tokens: int) -> None:
        if not loads:
            raise SecateurError("window: no layer, expected at least one")
        if num_tokens < 1:
            raise SecateurError(f"window: found {num_tokens} tokens, expected at least 1")
        for layer, counts in loads.items():
            check_loads(counts, f"window, layer {layer}")
        sizes = {layer: len(counts) for layer, counts in loads.items()}
        before = {layer: len(sums) for layer, sums in self.marks[-1].sums.items()} if self.marks else sizes
        if sizes != before:
            changed = sorted({layer for layer, _ in sizes.items() ^ before.items()})
            raise SecateurError(
                f"window: layers {changed} have {[sizes.get(layer, 0) for layer in changed]} experts, but "
                f"{[before.get(layer, 0) for layer in changed]} in the windows before"
            )


class MarkState(msgspec.Struct, frozen=True, kw_only=True):
    windows: Count
    tokens: Count
    sums: dict[Layer, list[Count]]


class HistoryState(msgspec.Struct, frozen=True, kw_only=True):
    """What `LoadHistory.state` gives."""

    stride: Positive
    marks: list[MarkState]
