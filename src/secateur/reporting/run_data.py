"""Read and check a run folder of `secateur pretrain`: files in, one frozen value out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import SecateurError
from secateur.files.fields import Fields, as_fields, read_json, read_lines, read_object
from secateur.plans import Plan

PRUNING_REASONS = ("stable", "step", "tokens")
REASONS = (*PRUNING_REASONS, "rearrange")
BALANCES = ("balance_before", "balance_after", "over_bound")
PHASES = ("transition", "stable", "pruned")


@dataclass(frozen=True, kw_only=True)
class TrainPoint:
    """One logged training step. Numbers that were not finite are None."""

    step: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    load_max_over_mean: float | None
    phase: str


@dataclass(frozen=True, kw_only=True)
class EvalPoint:
    """One validation: mean loss in nats a token, over all domains and for each."""

    step: int
    tokens: int
    validation_loss: float | None
    by_domain: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class LoadWindow:
    """Tokens per expert of one statistics window that ended at `step`, in the numbering of that time."""

    where: str
    step: int
    tokens: int
    layers: dict[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PlacedEvent:
    """Experts on ranks, means over the layers: busiest rank over the mean in the old and new order, the new one over
    its lower bound; and how many experts changed their rank."""

    num_ranks: int
    balance_before: float
    balance_after: float
    over_bound: float
    moved: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """One pruning or rearrangement: the decision, the loads it was made on (numbering before it), what it changed.

    placement: of the kept experts on expert-parallel ranks, None where the run did not place them.
    """

    step: int
    tokens: int
    reason: str
    plan: Plan
    loads: dict[int, tuple[int, ...]]
    parameters_before: int
    parameters_after: int
    experts_before: int
    experts_after: int
    rerouted_share: float | None
    alpha: float | None
    beta: float | None
    memory_before: dict[str, int]
    memory_after: dict[str, int]
    surgery_seconds: float | None
    oracle: float | None
    placement: PlacedEvent | None
    record: dict[str, Any]

    @property
    def rule(self) -> str:
        """What decided, as the user gave it: "target_params 0.67" or "alpha 0.4, beta 0.1"."""
        given = self.plan.details.get("rule")
        fields = given if isinstance(given, dict) else {"alpha": self.alpha, "beta": self.beta}
        words = [f"{key} {value}" for key, value in fields.items() if value not in (None, False, True)]
        return ", ".join(words) or self.plan.criterion

    def limit(self, name: str, layer: int) -> tuple[float, bool] | None:
        """The alpha or beta of a layer's cut, and whether it was given (else a goal came to it); None if off."""
        given = {"alpha": self.alpha, "beta": self.beta}[name]
        if given is not None:
            return given, True
        layers = self.plan.details.get("layers")
        one = layers.get(str(layer)) if isinstance(layers, dict) else None
        value = one.get(name) if isinstance(one, dict) and self.alpha is None and self.beta is None else None
        return (float(value), False) if isinstance(value, int | float) and value > 0 else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run says of itself. `before` and `after` are tokens per second."""

    validation_loss: float | None
    validation_loss_by_domain: dict[str, float | None]
    before: float | None
    after: float | None
    steps: int
    tokens: int
    seconds: float | None
    parameters: int
    peak_memory_bytes: float | None


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run folder. `summary` is None while the run is not finished, `control` without a run to compare with."""

    info: dict[str, Any]
    model_type: str
    parameters: int
    experts: dict[int, int]
    train: tuple[TrainPoint, ...]
    evals: tuple[EvalPoint, ...]
    windows: tuple[LoadWindow, ...]
    events: tuple[Event, ...]
    summary: Summary | None
    control: RunData | None

    @property
    def prunings(self) -> tuple[Event, ...]:
        """The events that dropped experts."""
        return tuple(event for event in self.events if event.reason in PRUNING_REASONS)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, as far as the files know."""
        seen = [point.tokens for series in (self.train, self.evals, self.windows, self.events) for point in series]
        return max([0, *seen, *([self.summary.tokens] if self.summary else [])])

    def first_ids(self, num_events: int) -> dict[int, tuple[int, ...]]:
        """For each layer the first id of every expert that is left after `num_events` events, in current order."""
        plan = Plan.identity(self.experts)
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
    model, _versions, _hardware = (info.part(key) for key in ("model", "versions", "hardware"))
    logged = list(read_lines(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else []
    kinds = {kind: [line for line in logged if line.text("kind", READERS) == kind] for kind in READERS}
    windows = list(read_lines(folder / "loads.jsonl")) if (folder / "loads.jsonl").exists() else []
    run = RunData(
        info=info.data,
        model_type=model.text("model_type"),
        parameters=model.integer("parameters"),
        experts=model.by_layer("experts", Fields.integer),
        train=_series(kinds["train"], _train_point),
        evals=_series(kinds["eval"], _eval_point),
        windows=_series(windows, _load_window),
        events=_events(folder / "events.json"),
        summary=_summary(folder / "summary.json"),
        control=control,
    )
    if not run.experts:
        raise model.error("experts", "at least one layer with experts")
    _check_events(run, str(folder / "events.json"))
    _check_windows(run)
    return run


def _train_point(line: Fields) -> TrainPoint:
    return TrainPoint(
        step=line.integer("step"),
        tokens=line.integer("tokens"),
        loss=line.number("loss"),
        tokens_per_second=line.number("tokens_per_second"),
        load_max_over_mean=line.number("load_max_over_mean"),
        phase=line.text("phase", PHASES),
    )


def _eval_point(line: Fields) -> EvalPoint:
    return EvalPoint(
        step=line.integer("step"),
        tokens=line.integer("tokens"),
        validation_loss=line.number("validation_loss"),
        by_domain=line.numbers("validation_loss_by_domain"),
    )


def _load_window(line: Fields) -> LoadWindow:
    layers = line.by_layer("layers", Fields.integers)
    return LoadWindow(where=line.where, step=line.integer("step"), tokens=line.integer("tokens"), layers=layers)


READERS = {"train": _train_point, "eval": _eval_point}

Point = TypeVar("Point", TrainPoint, EvalPoint, LoadWindow)


def _series(lines: list[Fields], take: Callable[[Fields], Point]) -> tuple[Point, ...]:
    """The points in order of their steps. A resumed run logs the steps after its checkpoint again: the later count."""
    series: list[Point] = []
    for line in lines:
        point = take(line)
        while series and series[-1].step >= point.step:
            series.pop()
        if series and series[-1].tokens >= point.tokens:
            raise line.error("tokens", f"more than the {series[-1].tokens} of step {series[-1].step}")
        series.append(point)
    return tuple(series)


def _events(path: Path) -> tuple[Event, ...]:
    if not path.exists():
        return ()
    records = read_json(path)
    if not isinstance(records, list):
        raise SecateurError(f"{path}: found {records!r:.80}, expected a list of events")
    return tuple(_event(as_fields(record, f"{path}, event {index}")) for index, record in enumerate(records, start=1))


def _event(record: Fields) -> Event:
    try:
        plan = Plan.from_json(record.require("plan"))
    except SecateurError as error:
        raise SecateurError(f"{record.where}: {error}") from error
    return Event(
        step=record.integer("step"),
        tokens=record.integer("tokens"),
        reason=record.text("reason", REASONS),
        plan=plan,
        loads=record.by_layer("loads", Fields.integers),
        parameters_before=record.integer("parameters_before"),
        parameters_after=record.integer("parameters_after"),
        experts_before=record.integer("experts_before"),
        experts_after=record.integer("experts_after"),
        rerouted_share=record.number("rerouted_share"),
        alpha=record.number("alpha"),
        beta=record.number("beta"),
        memory_before=_memory(record.part("memory_before")),
        memory_after=_memory(record.part("memory_after")),
        surgery_seconds=record.number("surgery_seconds"),
        oracle=record.number("oracle_max_abs_difference"),
        placement=_placement(record) if record.data.get("placement") is not None else None,
        record=record.data | {"layers": record.part("layers").data},
    )


def _placement(record: Fields) -> PlacedEvent:
    layers = record.by_layer("placement", Fields.part)
    if not layers:
        raise record.error("placement", "an entry for each layer")
    means: dict[str, Any] = {}
    for name in BALANCES:
        values = [layer.number(name) for layer in layers.values()]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            raise record.error("placement", f"a finite number as {name} of every layer")
        means[name] = sum(known) / len(known)
    ranks = {layer.integer("num_ranks") for layer in layers.values()}
    if len(ranks) != 1:
        raise record.error("placement", "one number of ranks for all layers")
    return PlacedEvent(num_ranks=ranks.pop(), moved=sum(layer.integer("moved") for layer in layers.values()), **means)


def _memory(part: Fields) -> dict[str, int]:
    return {key: part.integer(key) for key in ("parameters_bytes", "optimizer_bytes")}


def _summary(path: Path) -> Summary | None:
    if not path.exists():
        return None
    summary = read_object(path)
    if summary.require("finished") is not True:
        return None
    speed = summary.part("tokens_per_second")
    return Summary(
        validation_loss=summary.number("validation_loss"),
        validation_loss_by_domain=summary.numbers("validation_loss_by_domain"),
        before=speed.number("before"),
        after=speed.number("after"),
        steps=summary.integer("steps"),
        tokens=summary.integer("tokens"),
        seconds=summary.number("seconds"),
        parameters=summary.integer("parameters"),
        peak_memory_bytes=summary.number("peak_memory_bytes"),
    )


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


def _check_windows(run: RunData) -> None:
    counts = [{layer: len(ids) for layer, ids in run.first_ids(n).items()} for n in range(len(run.events) + 1)]
    for window in run.windows:
        _check_loads(window.layers, counts[run.events_before(window.step)], window.where)


def _check_loads(loads: dict[int, tuple[int, ...]], experts: dict[int, int], where: str) -> None:
    found = {layer: len(load) for layer, load in loads.items()}
    if found != experts:
        raise SecateurError(f"{where}: found loads of {found} (layer: experts), expected {experts}")
