"""A recorded load history: a run of `secateur pretrain`, or JSON lines of any training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import SecateurError
from secateur.reporting.run_files import LoadWindow, read_loads
from secateur.surgery.events import PruneEvent, read_events
from secateur.train.load_history import LoadHistory

LOADS, EVENTS = "loads.jsonl", "events.json"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The windows of a history, each with the name that messages give it, in order of their steps.

    events: what was done to the experts on the way. notes: what a reader must know of it, such as gaps.
    """

    windows: tuple[tuple[str, LoadWindow], ...]
    events: tuple[PruneEvent, ...]
    notes: tuple[str, ...]


def read_history(path: Path) -> Recorded:
    """Read the folder of a run, or one file of JSON lines.

    A line is {"step": ..., "tokens": ..., "layers": {layer: [tokens of each expert]}} of one window: the optimizer
    steps and the tokens of the run until its end, and what was routed in it. "learning_rate" at its end is optional.

    Raises:
        SecateurError: there is no history, a line is not of this form, or the windows do not belong to one model.
    """
    file = path / LOADS if path.is_dir() else path
    if not file.is_file():
        what = f"no {LOADS} in it" if path.is_dir() else "no such file"
        raise SecateurError(f"{path}: {what}, expected the folder of a run or a file of JSON lines with loads")
    windows: list[tuple[str, LoadWindow]] = []
    for where, window in read_loads(file):
        while windows and windows[-1][1].step >= window.step:  # a resumed run logs some steps again: the later count
            windows.pop()
        before = windows[-1][1] if windows else None
        if before is not None and before.tokens >= window.tokens:
            raise SecateurError(
                f"{where}: 'tokens' is {window.tokens}, expected more than the {before.tokens} of step {before.step}"
            )
        if before is not None and before.layers.keys() != window.layers.keys():
            raise SecateurError(
                f"{where}: found the layers {sorted(window.layers)}, expected {sorted(before.layers)} as in the window "
                "before"
            )
        windows.append((where, window))
    if not windows:
        raise SecateurError(f"{file}: no window in it, expected at least one line with loads")
    events = path / EVENTS
    done = tuple(event for event, _ in read_events(events)) if path.is_dir() and events.is_file() else ()
    only = [window for _, window in windows]
    return Recorded(windows=tuple(windows), events=done, notes=(*_gaps(only), *_rates(only)))


def histories(recorded: Recorded) -> Iterator[tuple[LoadWindow, LoadHistory, str | None]]:
    """Each window, the history up to its end, and what was noticed at it.

    A pruning begins a new history, and so do experts that are more or fewer than in the window before.
    """
    history, waiting = LoadHistory(), list(recorded.events)
    tokens, before = 0, None
    for where, window in recorded.windows:
        note = None
        while waiting and waiting[0].step < window.step:
            _follow(history, waiting.pop(0))
        counts = {layer: len(loads) for layer, loads in window.layers.items()}
        if history.num_windows and before is not None and counts != before:
            note = f"step {window.step}: the experts are other ones than before ({_changed(before, counts)})"
            history.clear()
        try:
            history.add(window.layers, window.tokens - tokens)
        except SecateurError as error:
            raise SecateurError(f"{where}: {error}") from error
        tokens, before = window.tokens, counts
        yield window, history, note


def _follow(history: LoadHistory, event: PruneEvent) -> None:
    if event.experts_after != event.experts_before:
        history.clear()
    elif history.num_windows:
        history.reorder({layer: one.order for layer, one in event.plan.layers.items()})


def _changed(before: dict[int, int], now: dict[int, int]) -> str:
    return ", ".join(f"layer {layer}: {before[layer]} -> {now[layer]}" for layer in now if before[layer] != now[layer])


def _gaps(windows: Sequence[LoadWindow]) -> list[str]:
    """Windows that are longer than the shortest one, in steps: loads are missing there."""
    steps = [0, *(window.step for window in windows)]
    lengths = [after - before for before, after in itertools.pairwise(steps)]
    long = [number for number, length in enumerate(lengths) if length > 1.5 * min(lengths)]
    if not long:
        return []
    first = long[0]
    return [
        f"{len(long)} gaps: windows have {min(lengths)} steps, but between the steps {steps[first]} and "
        f"{steps[first + 1]} there is one for {lengths[first]}; loads in between are unknown"
    ]


def _rates(windows: Sequence[LoadWindow]) -> list[str]:
    if all(window.learning_rate is None and window.rises is None for window in windows):
        return ["no learning rate is recorded: a warm-up is not seen; tell of it by the steps that it takes"]
    return []
