"""Read and check a run folder of `secateur pretrain`: files in, one frozen value out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import SecateurError
from secateur.files.json import read_object
from secateur.files.records import as_record
from secateur.plans import Plan
from secateur.reporting.run_files import (
    UNPRUNED,
    EvalPoint,
    LoadWindow,
    RunFile,
    RunModel,
    Summary,
    TrainPoint,
    UnprunedFile,
    read_loads,
    read_metrics,
    read_summary,
    read_unpruned,
)
from secateur.surgery.events import REARRANGE, PruneEvent, read_events


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run folder. `summary` is None while the run is not finished, `control` without a run to compare with,
    `unpruned` where no pruning was left at the end.

    info: run.json, and event_records: the events, as they were written.
    """

    info: dict[str, Any]
    model: RunModel
    train: tuple[TrainPoint, ...]
    evals: tuple[EvalPoint, ...]
    windows: tuple[LoadWindow, ...]
    events: tuple[PruneEvent, ...]
    event_records: tuple[dict[str, Any], ...]
    summary: Summary | None
    unpruned: UnprunedFile | None
    control: RunData | None

    @property
    def prunings(self) -> tuple[PruneEvent, ...]:
        """The events that dropped experts."""
        return tuple(event for event in self.events if event.reason != REARRANGE)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, as far as the files know."""
        seen = [point.tokens for series in (self.train, self.evals, self.windows, self.events) for point in series]
        return max([0, *seen, *([self.summary.tokens] if self.summary else [])])

    def first_ids(self, num_events: int) -> dict[int, tuple[int, ...]]:
        """For each layer the first id of every expert that is left after `num_events` events, in current order."""
        plan = Plan.identity(self.model.experts)
        for event in self.events[:num_events]:
            plan = plan.compose(event.plan)
        return {layer: entry.order for layer, entry in plan.layers.items()}

    def events_before(self, step: int) -> int:
        """Events that a window which ended at `step` had already seen; at its own step an event comes after."""
        return sum(event.step < step for event in self.events)


def read_run(folder: Path) -> RunData:
    """Read a run folder; files that a young run has not written yet count as empty.

    Raises:
        SecateurError: no run.json, a malformed file (with its line), or files that contradict each other.
    """
    control = folder / "control"
    return _read(folder, control=_read(control, control=None) if (control / "run.json").exists() else None)


def _read(folder: Path, *, control: RunData | None) -> RunData:
    if not (folder / "run.json").is_file():
        raise SecateurError(f"{folder}: no run.json found, expected the folder of a `secateur pretrain` run")
    info = read_object(folder / "run.json")
    model = as_record(info, RunFile, str(folder / "run.json")).model
    if model is None:
        raise SecateurError(f"{folder / 'run.json'}: 'model' is missing, expected the model of the run")
    names = ("metrics.jsonl", "loads.jsonl", "events.json", "summary.json", UNPRUNED)
    metrics, loads, events, summary, unpruned = (folder / name for name in names)
    logged = list(read_metrics(metrics)) if metrics.exists() else []
    windows = _in_order(list(read_loads(loads)) if loads.exists() else [])
    done = read_events(events) if events.exists() else []
    run = RunData(
        info=info,
        model=model,
        train=_points(_in_order([(where, point) for where, point in logged if isinstance(point, TrainPoint)])),
        evals=_points(_in_order([(where, point) for where, point in logged if isinstance(point, EvalPoint)])),
        windows=_points(windows),
        events=tuple(event for event, _ in done),
        event_records=tuple(record for _, record in done),
        summary=read_summary(summary) if summary.exists() else None,
        unpruned=read_unpruned(unpruned) if unpruned.exists() else None,
        control=control,
    )
    _check_events(run, str(events))
    _check_windows(run, [where for where, _ in windows])
    return run


Point = TypeVar("Point", TrainPoint, EvalPoint, LoadWindow)


def _points(named: list[tuple[str, Point]]) -> tuple[Point, ...]:
    return tuple(point for _, point in named)


def _in_order(named: list[tuple[str, Point]]) -> list[tuple[str, Point]]:
    """The points in order of their steps. A resumed run logs the steps after its checkpoint again: the later count."""
    series: list[tuple[str, Point]] = []
    for where, point in named:
        while series and series[-1][1].step >= point.step:
            series.pop()
        before = series[-1][1] if series else None
        if before and before.tokens >= point.tokens:
            raise SecateurError(
                f"{where}: 'tokens' is {point.tokens}, expected more than the {before.tokens} of step {before.step}"
            )
        series.append((where, point))
    return series


def _check_events(run: RunData, where: str) -> None:
    """Each plan must start from the experts that the one before left, and the loads must be of that numbering."""
    for index, event in enumerate(run.events):
        name = f"{where}, event {index + 1}"
        if index and event.step <= run.events[index - 1].step:
            raise SecateurError(f"{name}: step is {event.step}, expected more than {run.events[index - 1].step}")
        current = {layer: len(ids) for layer, ids in run.first_ids(index).items()}
        after = current | {layer: plan.experts_after for layer, plan in event.plan.layers.items()}
        planned = {layer: plan.experts_before for layer, plan in event.plan.layers.items()}
        expected = {layer: current.get(layer) for layer in planned}
        if planned != expected:
            raise SecateurError(f"{name}: the plan starts from {planned} experts, expected {expected}")
        _check_loads(event.loads, current, f"{name}: loads")
        for key, found, counts in (
            ("experts_before", event.experts_before, current),
            ("experts_after", event.experts_after, after),
        ):
            if found != sum(counts.values()):
                raise SecateurError(f"{name}: {key} is {found}, but the plans make it {sum(counts.values())}")


def _check_windows(run: RunData, names: list[str]) -> None:
    counts = [{layer: len(ids) for layer, ids in run.first_ids(n).items()} for n in range(len(run.events) + 1)]
    for where, window in zip(names, run.windows, strict=True):
        _check_loads(window.layers, counts[run.events_before(window.step)], where)


def _check_loads(loads: Mapping[int, Sequence[int]], experts: dict[int, int], where: str) -> None:
    found = {layer: len(load) for layer, load in loads.items()}
    if found != experts:
        raise SecateurError(f"{where}: found loads of {found} (layer: experts), expected {experts}")
