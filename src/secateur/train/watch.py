"""The loads of a run so far: windows of token counts over all ranks, and the phase that they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import MoEModel
from secateur.files.records import Count, Finite, as_record
from secateur.observation.loads import CountMask, LoadCounter
from secateur.stats import RouterStats
from secateur.surgery.trained_by import TrainedBy
from secateur.train.distributed.job import Job
from secateur.train.load_history import LoadHistory
from secateur.train.phases import PhaseConstants, PhaseReport, doublings_ahead, phase_of, recent_loads, recent_tokens
from secateur.train.rates import RateWatch, Schedule


class LoadWatch:
    """Counts tokens per expert in windows of `window_steps` optimizer steps; sums over the ranks once a window.

    Attributes:
        num_tokens: tokens seen in full windows, and in open ones that a pruning cut short. last_window: the window
            that the last `step` ended, None when it ended none. report: the phase as of the last full window.
        rises: whether the learning rate still rose in that window, or is known to rise later. schedule: of the learning
            rate, where it is known; without one the rates are watched. end: the last step of the run, where it is
            known. ahead: see `doublings_ahead`; doubtful: see `LoadCounter.doubtful_share`, of this rank; both as of
            the last full window.
    """

    def __init__(
        self,
        moe: MoEModel,
        job: Job,
        optimizer: TrainedBy,
        *,
        window_steps: int,
        constants: PhaseConstants,
        warmup_steps: int,
        callers: Iterable[nn.Module] = (),
        count_mask: CountMask | None = None,
    ) -> None:
        self._counter = LoadCounter(moe, callers=callers, count_mask=count_mask)
        self._job = job
        self._moe = moe
        self._window_steps = window_steps
        self.warmup_steps = warmup_steps
        self._constants = constants
        self._history = LoadHistory()
        self._rates = RateWatch(optimizer)
        self._last_full: RouterStats | None = None
        self._steps_in_window = 0
        self._is_first_step = True
        self._learned = False
        self.schedule: Schedule | None = None
        self.end: int | None = None
        self.ahead: float | None = None
        self.num_tokens = 0
        self.last_window: RouterStats | None = None
        self.report = PhaseReport(phase="begin")
        self.rises = False
        self.doubtful = 0.0

    def step(self, num_steps: int) -> None:
        """One more optimizer step is done, `num_steps` of the run in all."""
        if self._is_first_step:
            self._job.check_running()  # now, not at the pruning hours later
            self._is_first_step = False
        self._rates.step()
        self._steps_in_window += 1
        self.last_window = None
        if not self._history.num_windows:  # after a pruning the report of its own window stays up to here
            self.report = PhaseReport(phase="begin")
        if self._steps_in_window == self._window_steps:
            window = self._job.sum(self._counter.read())
            self.doubtful = self._counter.doubtful_share()
            self._open_window(self._moe)
            tokens = _tokens(window)
            self._history.add(window.loads(), tokens)
            self.num_tokens += tokens
            self.last_window = self._last_full = window
            self.rises = num_steps < self._peak or self._rates.rose
            self.ahead = doublings_ahead(self._history, self._tokens_to_come(num_steps))
            self.report = phase_of(
                self._history, self._constants, rises=self.rises, learned=self._learned, ahead=self.ahead
            )
            self._learned |= (self.report.change or 0) >= self._constants.min_change
            self._rates.forget()

    @property
    def sample(self) -> Tensor | None:
        """See `LoadCounter`."""
        return self._counter.sample

    def paused(self) -> AbstractContextManager[None]:
        """See `LoadCounter`."""
        return self._counter.paused()

    @property
    def learning_rate(self) -> float | None:
        """See `RateWatch`."""
        return self._rates.learning_rate

    def statistics(self) -> RouterStats:
        """The loads of the moment that the phase is judged by, and of the open window, added up.

        Raises:
            SecateurError: nothing was counted at all.
        """
        settled = self.settled()
        parts = [] if settled is None else [settled]
        if not self._counter.is_empty or not parts:
            parts.append(self._job.sum(self._counter.read()))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def settled(self) -> RouterStats | None:
        """The same of full windows alone, None before one; no other rank is asked."""
        if not self._history.num_windows:
            return None
        return RouterStats.from_loads(recent_loads(self._history), recent_tokens(self._history))

    def after_pruning(self, moe: MoEModel) -> None:
        """Forget what was counted for the experts of before."""
        self._close_open_window()
        self._history.clear()
        self._last_full = None
        self._open_window(moe)

    def after_rearrangement(self, moe: MoEModel, orders: Mapping[int, Sequence[int]]) -> None:
        """Follow the experts to their new places, {layer: order[new] = old}."""
        self._close_open_window()
        self._history.reorder(orders)
        if self._last_full is not None:
            self._last_full = self._last_full.reordered(orders)
        self._open_window(moe)

    @property
    def load_max_over_mean(self) -> float | None:
        """Load of the busiest expert over the mean, averaged over layers, in the last full window; None before one."""
        if self._last_full is None:
            return None
        loads = self._last_full.loads().values()
        return sum(max(layer_loads) * len(layer_loads) / sum(layer_loads) for layer_loads in loads) / len(loads)

    def last_full_loads(self) -> dict[int, list[int]] | None:
        """{layer: tokens of each expert} of the last full window; None before one, and right after a pruning."""
        return None if self._last_full is None else self._last_full.loads()

    def detach(self) -> None:
        """Remove all hooks from the model."""
        self._counter.detach()

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """JSON-able, the same on every rank; all must call. One that calls `alone` leaves out the open window."""
        is_open = not alone and not self._counter.is_empty
        return {
            "num_tokens": self.num_tokens,
            "steps_in_window": 0 if alone else self._steps_in_window,
            "open_window": self._job.sum(self._counter.read()).to_json() if is_open else None,
            "last_window": None if self._last_full is None else self._last_full.to_json(),
            "history": self._history.state(),
            "report": msgspec.to_builtins(self.report),
            "learned": self._learned,
            "constants": msgspec.to_builtins(self._constants),
            **self._rates.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, on any number of ranks.

        Raises:
            SecateurError: the state is damaged, or was taken with other constants. Nothing was changed.
        """
        saved = as_record(state, WatchState, "LAEP state, watch")
        window = None if saved.open_window is None else RouterStats.from_json(saved.open_window)
        last = None if saved.last_window is None else RouterStats.from_json(saved.last_window)
        check_constants(saved.constants, self._constants)
        self._history.restore(saved.history)
        self._rates.restore(saved.rates, saved.rose)
        self.num_tokens, self.report, self._learned = saved.num_tokens, saved.report, saved.learned
        self._open_window(self._moe)
        self._steps_in_window = saved.steps_in_window
        if window is not None:
            # the sum over the ranks is what was saved; one of those that are summed carries it on
            self._counter.load(window if self._job.ranks.carries else window.emptied())
        self._last_full = last

    @property
    def _peak(self) -> int:
        """No step before this one has the highest learning rate, as far as that is known ahead."""
        return max(self.warmup_steps, self.schedule.peak if self.schedule else 0)

    def _tokens_to_come(self, num_steps: int) -> float | None:
        if self.end is None:
            return None
        per_step = self._history.num_tokens / (self._history.num_windows * self._window_steps)
        return max(0, self.end - num_steps) * per_step

    def _open_window(self, moe: MoEModel) -> None:
        self._moe = moe
        self._counter.reset(moe)
        self._steps_in_window = 0

    def _close_open_window(self) -> None:
        if not self._counter.is_empty:  # a fixed step may fall inside a window
            self.num_tokens += _tokens(self._job.sum(self._counter.read()))


class WatchState(msgspec.Struct, frozen=True, kw_only=True):
    """What `LoadWatch.state_dict` gives; the statistics and the history check their parts themselves."""

    num_tokens: Count
    steps_in_window: Count
    open_window: dict[str, Any] | None
    last_window: dict[str, Any] | None
    history: dict[str, Any]
    report: PhaseReport
    learned: bool
    constants: dict[str, Any]
    rates: list[Finite | None] | None
    rose: bool


def check_constants(saved: Mapping[str, Any], constants: PhaseConstants) -> None:
    """Raises SecateurError: a state was taken with other constants of the stable phase than these."""
    mine = msgspec.to_builtins(constants)
    if saved != mine:
        raise SecateurError(f"LAEP state: the saved constants of the phase are {saved}, but this run uses {mine}")


def _tokens(stats: RouterStats) -> int:
    return next(iter(stats.layers.values())).num_tokens
