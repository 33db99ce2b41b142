"""The loads of a run so far: windows of token counts over all ranks, and whether they are stable."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from secateur.families import MoEModel
from secateur.files.records import Count, as_record
from secateur.observation.loads import LoadCounter
from secateur.stats import RouterStats
from secateur.train.distributed.job import Job
from secateur.train.phases import PhaseConstants, StablePhaseDetector


class LoadWatch:
    """Counts tokens per expert in windows of `window_steps` optimizer steps; sums over the ranks once a window.

    Attributes:
        num_tokens: tokens seen in full windows, and in open ones that a pruning cut short. last_window: the window
            that the last `step` ended, None when it ended none. is_stable: as of the last full window.
    """

    def __init__(self, moe: MoEModel, job: Job, window_steps: int, phase: PhaseConstants) -> None:
        self._counter = LoadCounter(moe)
        self._job = job
        self._moe = moe
        self._window_steps = window_steps
        self._detector = StablePhaseDetector(phase)
        self._windows: deque[RouterStats] = deque(maxlen=phase.windows)
        self._steps_in_window = 0
        self._is_first_step = True
        self.num_tokens = 0
        self.last_window: RouterStats | None = None
        self.is_stable = False

    def step(self) -> None:
        """One more optimizer step is done."""
        if self._is_first_step:
            self._job.check_running()  # now, not at the pruning hours later
            self._is_first_step = False
        self._steps_in_window += 1
        self.last_window = None
        if self._steps_in_window == self._window_steps:
            window = self._job.sum(self._counter.read())
            self._open_window(self._moe)
            self.num_tokens += _tokens(window)
            self._windows.append(window)
            self.last_window = window
            self.is_stable = self._detector.update(window.loads()).stable

    def statistics(self) -> RouterStats:
        """The last windows and the open one, added up.

        Raises:
            SecateurError: nothing was counted at all.
        """
        parts = list(self._windows)
        if not self._counter.is_empty or not parts:
            parts.append(self._job.sum(self._counter.read()))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def after_pruning(self, moe: MoEModel) -> None:
        """Forget what was counted for the experts of before."""
        self._close_open_window()
        self._windows.clear()
        self._detector.reset()
        self.is_stable = False
        self._open_window(moe)

    def after_rearrangement(self, moe: MoEModel, orders: Mapping[int, Sequence[int]]) -> None:
        """Follow the experts to their new places, {layer: order[new] = old}."""
        self._close_open_window()
        self._windows = deque((window.reordered(orders) for window in self._windows), maxlen=self._windows.maxlen)
        self._detector.reorder(orders)
        self._open_window(moe)

    @property
    def load_max_over_mean(self) -> float | None:
        """Load of the busiest expert over the mean, averaged over layers, in the last full window; None before one."""
        if not self._windows:
            return None
        loads = self._windows[-1].loads().values()
        return sum(max(layer_loads) * len(layer_loads) / sum(layer_loads) for layer_loads in loads) / len(loads)

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._counter.detach()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank, and all ranks must call."""
        return {
            "num_tokens": self.num_tokens,
            "steps_in_window": self._steps_in_window,
            "open_window": None if self._counter.is_empty else self._job.sum(self._counter.read()).to_json(),
            "windows": [window.to_json() for window in self._windows],
            "detector": self._detector.state(),
            "stable": self.is_stable,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, on any number of ranks.

        Raises:
            SecateurError: the state is damaged, or of a detector with other constants. Nothing was changed.
        """
        saved = as_record(state, WatchState, "LAEP state, watch")
        window = None if saved.open_window is None else RouterStats.from_json(saved.open_window)
        windows = [RouterStats.from_json(window) for window in saved.windows]
        self._detector.restore(saved.detector)
        self.num_tokens = saved.num_tokens
        self._open_window(self._moe)
        self._steps_in_window = saved.steps_in_window
        if window is not None:
            # the sum over the ranks is what was saved; one of those that are summed carries it on
            self._counter.load(window if self._job.ranks.carries else window.emptied())
        self._windows.clear()
        self._windows.extend(windows)
        self.is_stable = saved.stable

    def _open_window(self, moe: MoEModel) -> None:
        self._moe = moe
        self._counter.reset(moe)
        self._steps_in_window = 0

    def _close_open_window(self) -> None:
        if not self._counter.is_empty:  # a fixed step may fall inside a window
            self.num_tokens += _tokens(self._job.sum(self._counter.read()))


class WatchState(msgspec.Struct, frozen=True, kw_only=True):
    """What `LoadWatch.state_dict` gives; the statistics and the detector check their parts themselves."""

    num_tokens: Count
    steps_in_window: Count
    open_window: dict[str, Any] | None
    windows: list[dict[str, Any]]
    detector: dict[str, Any]
    stable: bool


def _tokens(stats: RouterStats) -> int:
    return next(iter(stats.layers.values())).num_tokens
