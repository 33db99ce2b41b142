"""The files of a run folder as types: what `secateur pretrain` writes there, and goes on from, and the report reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from secateur.files.json import read_json, read_lines
from secateur.files.records import Count, Expert, Experts, Finite, Layer, as_record

UNPRUNED = "unpruned.json"
Phase = Literal["begin", "warm-up", "unknown", "unlearned", "moving", "stable"]  # of `secateur.train.phases`


class RunModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model that a run began with."""

    model_type: str
    parameters: Count
    experts: Annotated[
        dict[Layer, Experts], Meta(min_length=1, description="an object with at least one layer with experts")
    ]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "experts", dict(sorted(self.experts.items())))


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """run.json: `config` are the settings, and `model` is None until the model has been made."""

    config: dict[str, Any]
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    command: Any = None
    secateur: Any = None
    data: Any = None
    model: RunModel | None = None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a training; those that are not finite, as in a run that diverged, become None."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, _finite(getattr(self, name)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TrainPoint(Measured, frozen=True, kw_only=True):
    """One logged training step, a line of metrics.jsonl. seconds: of training so far."""

    step: Count
    tokens: Count
    seconds: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    load_max_over_mean: float | None = None
    phase: Phase | Literal["pruned", "transition"]  # transition: of releases before


class EvalPoint(Measured, frozen=True, kw_only=True):
    """One validation, a line of metrics.jsonl: mean loss in nats a token, over all domains and for each."""

    step: Count
    tokens: Count
    validation_loss: float | None = None
    by_domain: dict[str, float | None] = msgspec.field(name="validation_loss_by_domain", default_factory=dict)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What a line of metrics.jsonl is."""

    kind: Literal["train", "eval"]


class LoadWindow(msgspec.Struct, frozen=True, kw_only=True):
    """A line of loads.jsonl: tokens per expert of one statistics window that ended at `step`, in the numbering of
    that time. The rest is there where LAEP watched: see `secateur.train.phases`. tokens: of the run until then."""

    step: Count
    tokens: Count
    layers: dict[Layer, tuple[Count, ...]]
    learning_rate: Finite | None = None
    rises: bool | None = None
    ahead: Finite | None = None
    phase: Phase | None = None
    regret: Finite | None = None
    noise: Finite | None = None
    change: Finite | None = None
    tokens_needed: Count | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "layers", dict(sorted(self.layers.items())))


class Speeds(Measured, frozen=True, kw_only=True):
    """Tokens per second before the first pruning and after the last."""

    before: float | None = None
    after: float | None = None


class Summary(Measured, frozen=True, kw_only=True):
    """summary.json: what a finished run says of itself."""

    finished: bool
    steps: Count
    tokens: Count
    parameters: Count
    tokens_per_second: Speeds
    validation_loss: float | None = None
    validation_loss_by_domain: dict[str, float | None] = {}
    seconds: float | None = None
    peak_memory_bytes: float | None = None


class UnprunedFile(msgspec.Struct, frozen=True, kw_only=True):
    """unpruned.json: what the next pruning of a run that ended before it would have dropped, and what it waited for."""

    step: Count
    waits_for: str
    dropped: dict[Layer, list[Expert]] | None
    rerouted_share: Finite | None


def read_unpruned(path: Path) -> UnprunedFile:
    """unpruned.json. Raises as `read_summary`."""
    return as_record(read_json(path), UnprunedFile, str(path))


def read_metrics(path: Path) -> Iterator[tuple[str, TrainPoint | EvalPoint]]:
    """The lines of metrics.jsonl, each with its name for messages.

    Raises:
        SecateurError: the file cannot be read, or a line is none of these; the message names the line.
    """
    for where, line in read_lines(path):
        kind = as_record(line, Kind, where).kind
        yield where, as_record(line, TrainPoint, where) if kind == "train" else as_record(line, EvalPoint, where)


def read_loads(path: Path) -> Iterator[tuple[str, LoadWindow]]:
    """The lines of loads.jsonl, each with its name for messages. Raises as `read_metrics`."""
    for where, line in read_lines(path):
        yield where, as_record(line, LoadWindow, where)


def read_summary(path: Path) -> Summary | None:
    """summary.json; None where it says that the run is not finished.

    Raises:
        SecateurError: the file cannot be read or holds something else; the message names it.
    """
    summary = as_record(read_json(path), Summary, str(path))
    return summary if summary.finished else None
