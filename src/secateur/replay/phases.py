"""Replay a recorded load history through LAEP's detector of the stable phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.given import StrPath, check_given
from secateur.files.progress import OnStage, stage
from secateur.replay.histories import histories, read_history
from secateur.reporting.run_files import LoadWindow
from secateur.results import Result
from secateur.train.load_history import LoadHistory
from secateur.train.phases import (
    PhaseConstants,
    PhaseReport,
    doublings_ahead,
    in_words,
    mean_regret,
    phase_of,
    recent_loads,
)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Windows in a row of one phase: their first and last step, and the numbers at the last one."""

    first_step: int
    last_step: int
    learning_rate: float | None
    report: PhaseReport


@dataclass(frozen=True, kw_only=True)
class Phases(Result):
    """What `phases` found.

    Args:
        stable_at: the step at which LAEP would have pruned, None if it would not have.
        share: of the recorded steps at that time. stretches: the phases in order. notes: what a reader must know.
        regret_at_end: what the experts idlest at `stable_at` carry at the end of the record, over what the idlest ones
            of then carry; a share of the tokens, mean over the layers; None without `stable_at`, or where experts went
            after it.
    """

    stable_at: int | None
    share: float | None
    stretches: tuple[Stretch, ...]
    notes: tuple[str, ...]
    regret_at_end: float | None

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        head = ("steps", "phase", "learning rate", "regret", "noise", "change")
        return head, [
            (f"{one.first_step}-{one.last_step}", one.report.phase, one.learning_rate, *_numbers(one.report))
            for one in self.stretches
        ]


def phases(
    run: StrPath,
    *,
    max_regret: float = 0.025,
    max_noise: float = 0.005,
    min_change: float = 0.1,
    min_windows: int = 16,
    steps: int | None = None,
    warmup_steps: int = 0,
    on_progress: OnStage | None = None,
) -> Phases:
    """When would LAEP have found the loads of a run stable, and why not earlier?

    Args:
        run: the folder of a run of `pretrain`, pruned or not, or a file of JSON lines from any training: see
            `secateur.replay.histories.read_history`.
        max_regret: expected at the end of the run, as a share of the tokens; see `PhaseConstants`.
        max_noise: of it that sampling alone may make. min_change: share of the tokens that must have left the experts
            of the first window; 0 for a model that was trained before. min_windows: nothing is stable before so many.
        steps: of the whole run, where the record does not say how long it was to be; without it, the last one.
        warmup_steps: nothing is stable before so many steps; for records without a learning rate.
        on_progress: called with ("replaying", windows done, windows).

    Returns:
        The phases, window by window in `to_json`.

    Raises:
        SecateurError: there is no history, a line of it is malformed, or windows are of other layers.

    Example:
        >>> secateur.phases("run").stable_at
        440
    """
    check_given(phases, locals())
    constants = PhaseConstants(
        max_regret=max_regret, max_noise=max_noise, min_change=min_change, min_windows=min_windows
    )
    recorded, on_window = read_history(Path(run)), stage("replaying", on_progress)
    recorded_steps = recorded.windows[-1][1].step
    if steps is not None and steps < recorded_steps:
        raise SecateurError(f"steps is {steps}, expected at least the {recorded_steps} that were recorded")
    replayed = _Replay(constants, warmup_steps, steps or recorded_steps)
    notes = list(recorded.notes)
    for done, (window, history, note) in enumerate(histories(recorded), start=1):
        notes += [note] if note else []
        replayed.add(window, history)
        on_window(done, len(recorded.windows))
    last = recorded.windows[-1][1].step
    stable_at = replayed.stable_at
    share = None if stable_at is None else stable_at / last
    regret_at_end = replayed.regret_at_end()
    content: dict[str, Any] = {
        "steps": last,
        "stable_at": stable_at,
        "share": share,
        "regret_at_end": regret_at_end,
        "constants": asdict(constants),
        "notes": notes,
        "windows": replayed.windows,
    }
    return Phases(
        stable_at=stable_at,
        share=share,
        stretches=tuple(replayed.stretches),
        notes=tuple(notes),
        regret_at_end=regret_at_end,
        content=content,
    )


def why(result: Phases) -> str:
    """When LAEP would have pruned, in words, with what it waited for longest."""
    constants = PhaseConstants(**result.content["constants"])
    waited = [one for one in result.stretches if result.stable_at is None or one.last_step < result.stable_at]
    by_phase: dict[str, int] = {}
    for one in waited:
        by_phase[one.report.phase] = by_phase.get(one.report.phase, 0) + one.last_step - one.first_step
    parts = ", ".join(f"{phase} for {steps} steps" for phase, steps in by_phase.items() if steps)
    before = f" Before: {parts}." if parts else ""
    if result.stable_at is None:
        last = in_words(result.stretches[-1].report, constants)
        return f"not stable in {result.content['steps']} steps: {last}.{before}"
    end = (
        "" if result.regret_at_end is None else f" The choice of then has {result.regret_at_end:.2%} regret at the end."
    )
    return f"stable at step {result.stable_at}, after {result.share:.0%} of the run.{end}{before}"


class _Replay:
    def __init__(self, constants: PhaseConstants, warmup_steps: int, end: int) -> None:
        self.constants, self._warmup_steps, self._end = constants, warmup_steps, end
        self.windows: list[dict[str, Any]] = []
        self.stretches: list[Stretch] = []
        self.stable_at: int | None = None
        self._learned = False
        self._before: LoadWindow | None = None
        self._chosen: dict[int, list[int]] | None = None
        self._last: dict[int, list[int]] | None = None

    def add(self, window: LoadWindow, history: LoadHistory) -> None:
        ahead = window.ahead
        if ahead is None:
            ahead = doublings_ahead(history, (self._end - window.step) * window.tokens / window.step)
        report = phase_of(history, self.constants, rises=self._rises(window), learned=self._learned, ahead=ahead)
        self._learned |= (report.change or 0) >= self.constants.min_change
        if report.stable and self.stable_at is None:
            self.stable_at, self._chosen = window.step, recent_loads(history)
        self._last = recent_loads(history)
        self.windows.append(
            {"step": window.step, "tokens": window.tokens, "learning_rate": window.learning_rate, "ahead": ahead}
            | asdict(report)
        )
        first = self._before.step if self._before else 0
        if self.stretches and self.stretches[-1].report.phase == report.phase:
            first = self.stretches.pop().first_step
        self.stretches.append(
            Stretch(first_step=first, last_step=window.step, learning_rate=window.learning_rate, report=report)
        )
        self._before = window

    def regret_at_end(self) -> float | None:
        if self._chosen is None or self._last is None:
            return None
        sizes = [{layer: len(counts) for layer, counts in loads.items()} for loads in (self._chosen, self._last)]
        return mean_regret(self._chosen, self._last) if sizes[0] == sizes[1] else None

    def _rises(self, window: LoadWindow) -> bool:
        if window.step < self._warmup_steps:
            return True
        if window.rises is not None:
            return window.rises
        before = self._before.learning_rate if self._before else None
        return before is not None and window.learning_rate is not None and window.learning_rate > before


def _numbers(report: PhaseReport) -> list[str | None]:
    values = report.regret, report.noise, report.change
    return [None if value is None else f"{value:.2%}" for value in values]
