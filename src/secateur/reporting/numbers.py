"""The numbers of the report: a run in, plain values out. No files, no drawing, no words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from secateur.files.limits import MAX_FLOAT
from secateur.reporting.ranks import balance_json, rank_balance
from secateur.reporting.run_data import RunData
from secateur.reporting.run_files import EvalPoint, LoadWindow
from secateur.surgery.events import BALANCES, PruneEvent

MOST_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Training tokens per second before the first pruning and after the last."""

    before: float | None
    after: float | None
    source: str


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
class Comparison:
    """Validation loss of the run and of the control after the same number of tokens."""

    tokens: int
    run: float
    control: float

    @property
    def difference(self) -> float:
        """Above 0: the run is worse than the control."""
        return self.run - self.control


@dataclass(frozen=True, kw_only=True)
class LoadHistory:
    """Load over the mean load of its window, rows by first expert id (E, W); nan where an expert is gone.

    `edges` (W + 1,) are the tokens between which each window lies.
    """

    edges: NDArray[np.float64]
    ratio: NDArray[np.float64]


def stretches(windows: Sequence[LoadWindow]) -> Iterator[tuple[str, int, int]]:
    """(phase, first token, last token) of windows in a row with one phase."""
    begin = tokens = 0
    phase: str | None = None
    for window in windows:
        if window.phase != phase:
            if phase is not None:
                yield phase, begin, tokens
            phase, begin = window.phase, tokens
        tokens = window.tokens
    if phase is not None:
        yield phase, begin, tokens


def smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a fortieth of the values, without the pull to 0 at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def chosen_layers(layers: list[int]) -> list[int]:
    """All layers, or `MOST_LAYERS` of them at even distances with the first and the last."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def ascending(loads: Sequence[int]) -> list[int]:
    """Expert ids from the idlest to the busiest; of two equal ones the higher id first, as LAEP drops them."""
    return sorted(range(len(loads)), key=lambda expert: (loads[expert], -expert))


def dropped_share(event: PruneEvent, layer: int) -> float | None:
    """Share of a layer's routed tokens that went to the experts it loses; None when nothing was routed."""
    loads = event.loads[layer]
    dropped = event.plan.layers[layer].dropped if layer in event.plan.layers else ()
    return sum(loads[expert] for expert in dropped) / sum(loads) if sum(loads) else None


def rule_in_words(event: PruneEvent) -> str:
    """What decided, as the user gave it: "target_params 0.67" or "alpha 0.4, beta 0.1"."""
    given = event.plan.details.get("rule")
    entries = given if isinstance(given, dict) else {"alpha": event.alpha, "beta": event.beta}
    words = [f"{key} {value}" for key, value in entries.items() if value not in (None, False, True)]
    return ", ".join(words) or event.plan.criterion


def limit(event: PruneEvent, name: str, layer: int) -> tuple[float, bool] | None:
    """The alpha or beta of a layer's cut, and whether it was given (else a goal came to it); None if off."""
    given = {"alpha": event.alpha, "beta": event.beta}[name]
    if given is not None:
        return given, True
    layers = event.plan.details.get("layers")
    one = layers.get(str(layer)) if isinstance(layers, dict) else None
    value = one.get(name) if isinstance(one, dict) and event.alpha is None and event.beta is None else None
    return (float(value), False) if isinstance(value, int | float) and 0 < value <= MAX_FLOAT else None


def placed(event: PruneEvent) -> PlacedEvent | None:
    """How an event placed the experts of all layers, None where it did not."""
    layers = list((event.placement or {}).values())
    if not layers:
        return None
    means = {name: sum(getattr(one, name) for one in layers) / len(layers) for name in (*BALANCES, "over_bound")}
    return PlacedEvent(num_ranks=layers[0].num_ranks, moved=sum(one.moved for one in layers), **means)


def load_history(run: RunData, layer: int) -> LoadHistory:
    """The loads of one layer in all windows, whatever the numbering was at the time."""
    edges = np.array([0, *(window.tokens for window in run.windows)], dtype=np.float64)
    ratio = np.full((run.model.experts[layer], len(run.windows)), np.nan)
    numbering = [run.first_ids(n)[layer] for n in range(len(run.events) + 1)]
    for column, window in enumerate(run.windows):
        loads = np.array(window.layers[layer], dtype=np.float64)
        if loads.sum() > 0:
            ratio[list(numbering[run.events_before(window.step)]), column] = loads / loads.mean()
    return LoadHistory(edges=edges, ratio=ratio)


def speed(run: RunData) -> Speed:
    """From summary.json; for an unfinished run the medians of the logged steps.

    The first logged step of each part is left out: it holds the warm-up or the pruning.
    """
    if run.summary:
        pace = run.summary.tokens_per_second
        return Speed(before=pace.before, after=pace.after, source="summary.json")
    first = run.prunings[0].step if run.prunings else math.inf
    last = run.prunings[-1].step if run.prunings else math.inf
    before = [point.tokens_per_second for point in run.train if point.step < first][1:]
    after = [point.tokens_per_second for point in run.train if point.step > last][1:]
    return Speed(before=known_median(before), after=known_median(after), source="metrics.jsonl")


def known_median(values: list[float | None]) -> float | None:
    """The median of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def last_eval(run: RunData) -> EvalPoint | None:
    """The end of the run as summary.json states it, or the last validation so far."""
    if run.summary:
        return EvalPoint(
            step=run.summary.steps,
            tokens=run.summary.tokens,
            validation_loss=run.summary.validation_loss,
            by_domain=run.summary.validation_loss_by_domain,
        )
    return run.evals[-1] if run.evals else None


def shared_evals(run: RunData) -> list[Comparison]:
    """Validations of run and control after the same number of tokens, in order; the finished ends included."""
    if run.control is None:
        return []
    mine, theirs = ({point.tokens: point.validation_loss for point in _evals(side)} for side in (run, run.control))
    return [
        Comparison(tokens=tokens, run=loss, control=other)
        for tokens, loss in sorted(mine.items())
        if loss is not None and (other := theirs.get(tokens)) is not None
    ]


def _evals(run: RunData) -> list[EvalPoint]:
    end = last_eval(run)
    return [*run.evals, *([end] if end else [])]


def compare(run: RunData) -> Comparison | None:
    """Run against control at the last number of tokens that both were validated at."""
    return next(reversed(shared_evals(run)), None)


def report_json(run: RunData) -> dict[str, Any]:
    """The content of report.json; numbers that are not known or not finite are None."""
    balance = rank_balance(run)
    end, pace, versus = last_eval(run), speed(run), compare(run)
    content = {
        "finished": run.summary is not None,
        "tokens": run.tokens,
        "events": [_event_json(event, record) for event, record in zip(run.events, run.event_records, strict=True)],
        "phases": [
            {"phase": phase, "first_tokens": first, "last_tokens": last}
            for phase, first, last in stretches(run.windows)
        ],
        "unpruned": msgspec.to_builtins(run.unpruned, str_keys=True),
        "validation_loss": end.validation_loss if end else None,
        "validation_loss_by_domain": end.by_domain if end else {},
        "tokens_per_second": {"before": pace.before, "after": pace.after},
        "tokens_per_second_source": pace.source,
        "parameters": run.events[-1].parameters_after if run.events else run.model.parameters,
        "peak_memory_bytes": run.summary.peak_memory_bytes if run.summary else None,
        "control": _control_json(run.control, versus) if run.control else None,
        "balance_step": balance.step,
        "balance": {str(ranks.num_ranks): balance_json(ranks) for ranks in balance.ranks},
        "balance_left_out": {str(num_ranks): reason for num_ranks, reason in balance.left_out.items()},
        "model": run.info["model"],
        "versions": {"secateur": run.info.get("secateur"), **run.info.get("versions", {})},
        "hardware": run.info.get("hardware"),
    }
    strict: dict[str, Any] = _strict(content)
    return strict


def _event_json(event: PruneEvent, record: dict[str, Any]) -> dict[str, Any]:
    """The record as it was written, without the two long parts that events.json keeps."""
    short = {key: value for key, value in record.items() if key not in ("plan", "loads")}
    return short | {"criterion": event.plan.criterion}


def _control_json(control: RunData, versus: Comparison | None) -> dict[str, Any]:
    end = last_eval(control)
    return {
        "finished": control.summary is not None,
        "validation_loss": end.validation_loss if end else None,
        "validation_loss_by_domain": end.by_domain if end else {},
        "tokens_per_second": speed(control).before,
        "difference": versus.difference if versus else None,
        "compared_at_tokens": versus.tokens if versus else None,
    }


def _strict(value: Any) -> Any:
    """`value` without nan and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value
