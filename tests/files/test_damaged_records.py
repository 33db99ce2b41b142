"""However a record is damaged, reading it is a SecateurError that names the file, and never anything else.

A new record is one row of RECORDS: a whole sample, what reads it, and what may be damaged without being wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from secateur import stats
from secateur.data.packing import PackedTokens
from secateur.data.prepare import read_record as read_prepared
from secateur.decide.model_facts import ModelFacts
from secateur.errors import SecateurError
from secateur.files.json import read_json
from secateur.files.safetensors_header import read_header
from secateur.files.work_folder import NOTE, work_folder
from secateur.finetuning import run as finetuning
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.record import read_record as read_finetuned
from secateur.finetuning.trainer import read_spent
from secateur.model_folder import stages as pruning
from secateur.model_folder.checks.claims import read_verified
from secateur.model_folder.rewrite.report import read_applied
from secateur.model_folder.rewrite.undo import read_record as read_undo
from secateur.model_folder.stream.resume import RUN, WorkFolder
from secateur.model_folder.stream.states import DiskStates
from secateur.observation.observation import Observation
from secateur.placement.loads import read_loads as read_placement_loads
from secateur.plans import Plan
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run_folder import RunFolder
from secateur.reporting.run_data import read_run
from secateur.reporting.run_files import read_loads, read_metrics, read_summary, read_unpruned
from secateur.stats import RouterStats
from secateur.surgery.events import read_events
from secateur.train.checkpoints import read_seal
from secateur.train.load_history import LoadHistory
from secateur.training_checkpoint.names_file import read_naming
from secateur.upcycling.options import Asked
from secateur.upcycling.record import read_record as read_upcycled
from support.damage import WRONG, damaged_json
from support.model_folders import sealed
from support.run_folders import run_json

ANYTHING = frozenset({*WRONG, "missing", "unknown key"})
TEXTS = frozenset({"text", "empty text"})
POSITIVE = frozenset({"1.5", "2**63"})
NUMBERS = frozenset({"-1", *POSITIVE})
NOT_FINITE = frozenset({"nan", "infinity"})
OPTIONAL = frozenset({"null", "missing"})
MORE_KEYS = frozenset({"unknown key"})
MAYBE = NUMBERS | NOT_FINITE | OPTIONAL  # of a number that a run need not have


def write_over(path: Path, data: bytes) -> None:
    """As `Path.write_bytes`, in a file that is kept: emptying one first takes a hundred times as long."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One kind of record.

    Args:
        sample: a whole one, small, with every key that there is.
        read: reads it, given the path of the file.
        accepts: damage that is none: {path as in messages, "" being the whole: names of WRONG, "missing", "unknown
            key"}; a path that ends with "." or "[" stands for all beneath it.
        write: puts the damaged text where `read` finds it; as the file itself if nothing is given.
        is_line: the file is of lines, and the record is one.
        every: only every so-manyth damage is tried, for a record of many fields.
        is_required: a missing file is an error too.
    """

    file: str
    sample: Any
    read: Callable[[Path], object]
    accepts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    write: Callable[[Path, bytes], object] = write_over
    is_line: bool = False
    every: int = 1
    is_required: bool = True

    def is_accepted(self, path: str, name: str) -> bool:
        beneath = any(
            key.endswith((".", "[")) and path.startswith(key) and name in self.accepts[key] for key in self.accepts
        )
        return beneath or name in self.accepts.get(path, ())


PLAN = {
    "format": "secateur-plan",
    "version": 1,
    "criterion": "x",
    "details": {"rule": {"alpha": 0.4}},
    "stats_digest": "ab",
    "removed": "reroute",
    "layers": {"0": {"experts_before": 4, "order": [1, 0]}, "3": {"experts_before": 2, "order": [0]}},
}

PLAN_ACCEPTS = {
    "criterion": frozenset({"text"}),
    "details": frozenset({"missing", "object", "unknown key"}),
    "details.": ANYTHING - NOT_FINITE,
    "stats_digest": TEXTS | OPTIONAL,
    "removed": OPTIONAL,
    "layers.0": frozenset({"missing"}),
    "layers.3": frozenset({"missing"}),
}
PLAN_INSIDE = {f"plan.{path}": accepted for path, accepted in PLAN_ACCEPTS.items()} | {"plan.details.": ANYTHING}

UNDO = {
    "format": "secateur-undo",
    "version": 1,
    "plan": PLAN,
    "mtp": "whole",
    "dropped": ["a.safetensors"],
    "weights": {"b.safetensors": {"bytes": 10, "sha256": "ab"}},
    "replaced": ["config.json"],
    "copied": {"more/tokenizer.json": "ab"},
}

COUNTS = {"format": "secateur-stats", "version": 1, "layers": {"0": {"num_tokens": 3, "token_count": [1, 2]}}}
LAYER_HEADER = {
    "__metadata__": {"format": "secateur-stats/3"},
    "layers.0.token_count": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "layers.0.num_tokens": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
    "layers.0.output_sum": {"dtype": "F64", "shape": [2, 1], "data_offsets": [24, 40]},
}
SUMS = {
    "format": "secateur-stats",
    "version": 2,
    "layers": {
        "0": {
            "num_tokens": 3,
            "token_count": [1, 2],
            "weight_sum": [0.5, 1.0],
            "norm_sum": [1.0, 2.0],
            "norm_square_sum": [1.0, 2.0],
            "weighted_norm_sum": [0.5, 0.25],
            "max_activation": [1.0, 2.0],
        }
    },
}
FACTS = {
    "model_type": "qwen3_moe",
    "digest": "ab",
    "top_k": 2,
    "num_groups": 1,
    "min_experts": 2,
    "total_bytes": 1000,
    "has_one_count": False,
    "num_experts": {"0": 2},
    "bytes_per_expert": {"0": 10},
}
EVENT = {
    "step": 10,
    "tokens": 100,
    "reason": "stable",
    "plan": PLAN | {"layers": {"0": {"experts_before": 3, "order": [2, 0]}}},
    "loads": {"0": [3, 1, 2]},
    "layers": {"0": {"experts_before": 3, "experts_after": 2, "dropped": [1], "rerouted_share": 0.5}},
    "parameters_before": 30,
    "parameters_after": 20,
    "memory_before": {"parameters_bytes": 1, "optimizer_bytes": 2},
    "memory_after": {"parameters_bytes": 1, "optimizer_bytes": 2},
    "alpha": 0.4,
    "beta": None,
    "surgery_seconds": 0.5,
    "oracle_max_abs_difference": 0.0,
    "placement": {"0": {"num_ranks": 2, "balance_before": 1.5, "balance_after": 1.0, "over_bound": 1.0, "moved": 1}},
    "experts_before": 3,
}
MEASURED = ("loss", "tokens_per_second", "load_max_over_mean", "learning_rate", "grad_norm", "parameters")
SIGNED = ("weight_sum", "weighted_norm_sum")


def write_header(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]], texts: Mapping[str, str]) -> None:
    """A safetensors file with {name: (dtype, shape, data)} and texts beside them."""
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
    text = json.dumps(header).encode()
    write_over(path, struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_about(path: Path, about: bytes) -> None:
    """Statistics of one layer with two experts, and in the header what they are of."""
    tensors = {
        "layers.0.token_count": ("I64", [2], struct.pack("<2q", 1, 2)),
        "layers.0.num_tokens": ("I64", [1], struct.pack("<q", 3)),
    }
    texts = {"format": "secateur-stats/1", "about": about.decode("utf-8", errors="surrogateescape")}
    write_header(path, tensors, texts)


def write_packed(path: Path, about: bytes) -> None:
    """Two packed blocks of two tokens."""
    tensors = {"blocks": ("I32", [2, 2], bytes(16))}
    write_header(path, tensors, {"secateur": about.decode("utf-8", errors="surrogateescape")})


def write_as_header(path: Path, header: bytes) -> None:
    """A safetensors file of 8 bytes of tensors."""
    write_over(path, struct.pack("<Q", len(header)) + header + bytes(8))


def write_layer(path: Path, header: bytes) -> None:
    """Where an unfinished pass over data keeps the statistics of layer 0."""
    layers = path.parent / ".out.work/layers"
    layers.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<2qq2d", 1, 2, 3, 0.5, 0.25)
    content = struct.pack("<Q", len(header)) + header + data
    write_over(layers / "0.safetensors", content)
    write_over(layers / "0.sha256", hashlib.sha256(content).hexdigest().encode())


def read_note(kind: Any) -> Callable[[Path], object]:
    """A reader of what a start of unfinished work was asked for."""

    def read(path: Path) -> object:
        with work_folder(path.parent, kind, "taken", note=path.name) as work:
            return work.before

    return read


FREE = {"files": {"a": [1, 2.5]}}  # an object that is kept and compared, never taken apart
IS_FREE = frozenset({"object", "unknown key"})
GONE = frozenset({"missing"})
LARGE = frozenset({"2**63", "huge"})
ASKED = {
    "model": FREE,
    "pretrained": FREE,
    "data": FREE,
    "choice": FREE,
    "undo": "a",
    "mtp": "drop",
}
KINDS = ("", "log_", "eval_", "save_")
OPTIONS = FinetuneOptions(data=("a",), eval_data=("b",), freeze=("c",)).to_json()
OPTIONS_ACCEPTS = (
    {f"options.{name}": GONE for name in OPTIONS if name != "data"}
    | {f"options.{name}": GONE | {"true"} for name in ("bf16", "new_head", "augment")}
    | {f"options.{name}": GONE | TEXTS for name in ("text_key", "split", "report_to")}
    | {f"options.{name}[0]": TEXTS for name in ("data", "eval_data", "freeze")}
    | {
        f"options.{name}": GONE | LARGE
        for name in ("sequence_length", "batch_size", "gradient_accumulation", *(f"{kind}steps" for kind in KINDS))
    }
    | {
        f"options.{name}": GONE | POSITIVE
        for name in ["epochs", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "router_aux_loss"]
    }
    | {"options": MORE_KEYS}  # of a later version
)
FINETUNED = {
    "format": "secateur-finetune",
    "version": 1,
    "secateur": "0.1.0",
    "name": "a",
    "source": "b/a",
    "model_type": "qwen3_moe",
    "experts": {"0": 8},
    "parameters": 100,
    "trained_parameters": 90,
    "router_aux_loss": {"from": "option", "router_aux_loss": 0.1},
    "steps": 2,
    "warmup_steps": 1,
    "epochs": 0.5,
    "data": FREE,
    "options": OPTIONS,
    "versions": {"torch": "2"},
    "hardware": FREE,
    "losses": [{"step": 2, "loss": 1.5, "learning_rate": 0.1, "grad_norm": 2.5}],
    "evaluations": [{"step": 2, "loss": 1.5, "accuracy": 0.5, "domains": {"all": {"loss": 1.5, "accuracy": 0.5}}}],
    "seconds": 1.5,
    "resumed_after_step": 1,
    "peak_memory_bytes": 1000,
    "tokens_per_second": 10.5,
}


def read_json_text(read: Callable[[Any], object]) -> Callable[[Path], object]:
    """A reader of a file for what reads a JSON value that came from elsewhere."""

    def read_file(path: Path) -> object:
        data = read_json(path)
        try:
            return read(data)
        except SecateurError as error:
            raise SecateurError(f"{path}: {error}") from error

    return read_file


GROWN = {
    "format": "secateur-upcycle",
    "version": 1,
    "secateur": "0.1",
    "parents": [{"name": "seed", "files": {"config.json": "ab"}}],
    "options": dataclasses.asdict(Asked(form="split", experts=4, top_k=2, router="norm", target="mixtral")),
    "target": "mixtral",
    "tensors": {"a.weight": {"made": "copied", "of": ["0:a.weight"], "times": 2.0}},
    "routers": {"b.weight": "cd"},
    "division": {"0": [1, 0]},
}

RECORDS = {
    "origin of a grown model": Record(
        file="upcycle.json",
        sample=json.loads(json.dumps(GROWN)),
        read=lambda path: read_upcycled(path.parent),
        accepts={
            **dict.fromkeys(("secateur", "target", "parents[0].name", "tensors.a.weight.of[0]"), TEXTS),
            **dict.fromkeys(("parents[0].files.config.json", "routers.b.weight"), TEXTS | {"missing"}),
            **dict.fromkeys(("tensors.a.weight", "division.0"), frozenset({"missing"})),
            "tensors.a.weight.times": NUMBERS | {"missing"},
            # each has a default, and `verify` works out from the parents what the numbers would have made
            "options.": frozenset({"missing"}),
            **dict.fromkeys(("options.target", "options.router"), TEXTS | OPTIONAL),
            **dict.fromkeys(("options.experts", "options.top_k"), OPTIONAL),
            **dict.fromkeys(("options.noise", "options.router_std"), POSITIVE | {"missing"}),
            **dict.fromkeys(("options.renormalise", "options.allow_unrelated"), frozenset({"true", "missing"})),
            **dict.fromkeys(
                (
                    "options.attention_from",
                    "options.attention_top_k",
                    "options.shared_neurons",
                    "options.samples",
                    "options.sequence_length",
                    "options.seed",
                ),
                frozenset({"-1", "2**63", "huge", "missing"}),
            ),
        },
    ),
    "plan": Record(
        file="plan.json",
        sample=PLAN,
        read=Plan.load,
        accepts=PLAN_ACCEPTS,
    ),
    "counts": Record(file="stats.json", sample=COUNTS, read=read_json_text(RouterStats.from_json)),
    "sums": Record(
        file="stats.json",
        sample=SUMS,
        read=read_json_text(RouterStats.from_json),
        accepts={f"layers.0.{name}": OPTIONAL for name in stats.DEFAULT_SUMS}
        | {f"layers.0.{name}[{expert}]": POSITIVE for name in stats.DEFAULT_SUMS for expert in range(2)}
        | {f"layers.0.{name}[{expert}]": NUMBERS for name in SIGNED for expert in range(2)},
    ),
    "origin of statistics": Record(
        file="stats.safetensors",
        sample={"model": FACTS, "data": {"seed": 0}},
        read=Observation.load,
        accepts={
            "": frozenset({"null"}),
            "model": frozenset({"null"}),
            "model.model_type": TEXTS,
            "model.digest": TEXTS,
            "model.has_one_count": frozenset({"true"}),
            "data": frozenset({"object", "unknown key"}),
            "data.": ANYTHING,
        },
        write=write_about,
    ),
    "settings of a run": Record(
        file="run.json",
        sample={"config": PretrainOptions(overrides={"top_k": 2}).to_json()},
        read=lambda path: RunFolder(path.parent).read_options(),
        accepts={
            "": MORE_KEYS,
            "config.": ANYTHING - {"missing", "unknown key"},
            "config.overrides": MORE_KEYS,
            "config.overrides.top_k": frozenset({"missing"}),
        },
        every=5,
    ),
    "model of a run": Record(
        file="run.json",
        sample=run_json(1000, {0: 2, 1: 2}),
        read=lambda path: read_run(path.parent),
        accepts={
            "": MORE_KEYS,
            **dict.fromkeys(("secateur", "command", "data", "config", "versions", "hardware"), frozenset({"missing"})),
            **dict.fromkeys(("secateur", "command", "command[", "data", "data."), ANYTHING),
            **dict.fromkeys(("config.", "versions.", "hardware."), ANYTHING),
            **dict.fromkeys(("config", "versions", "hardware"), frozenset({"object", "missing"}) | MORE_KEYS),
            "model": MORE_KEYS,
            "model.model_type": TEXTS,
            **dict.fromkeys(("model.attention", "model.layers", "model.top_k"), ANYTHING),
            "model.experts.0": frozenset({"missing"}),
            "model.experts.1": frozenset({"missing"}),
        },
    ),
    "event": Record(
        file="events.json",
        sample=[EVENT],
        read=read_events,
        accepts={
            "[0]": MORE_KEYS,
            "[0].alpha": NUMBERS | {"null"},
            "[0].beta": NUMBERS | {"null"},
            "[0].surgery_seconds": NUMBERS,
            "[0].oracle_max_abs_difference": NUMBERS | {"null"},
            "[0].plan.criterion": frozenset({"text"}),
            "[0].plan.details": frozenset({"missing", "object", "unknown key"}),
            "[0].plan.details.": ANYTHING,
            "[0].plan.stats_digest": TEXTS | OPTIONAL,
            "[0].plan.removed": OPTIONAL,
            "[0].layers.0": MORE_KEYS,
            "[0].layers.0.rerouted_share": NUMBERS,
            "[0].memory_before": MORE_KEYS,
            "[0].memory_after": MORE_KEYS,
            "[0].placement": OPTIONAL,
            "[0].placement.0": frozenset({"missing", "unknown key"}),
            "[0].placement.0.balance_before": NUMBERS,
            "[0].placement.0.balance_after": NUMBERS,
            "[0].placement.0.over_bound": NUMBERS,
            "[0].experts_before": ANYTHING,
        },
    ),
    "training line": Record(
        file="metrics.jsonl",
        sample={"kind": "train", "step": 1, "tokens": 2, "seconds": 0.5, "phase": "stable"}
        | dict.fromkeys(MEASURED, 1.5),
        read=lambda path: list(read_metrics(path)),
        accepts={"": MORE_KEYS, "seconds": MAYBE}
        | dict.fromkeys(MEASURED, MAYBE)
        | dict.fromkeys(("learning_rate", "grad_norm", "parameters"), ANYTHING),
        is_line=True,
    ),
    "validation line": Record(
        file="metrics.jsonl",
        sample={
            "kind": "eval",
            "step": 1,
            "tokens": 2,
            "validation_loss": 1.5,
            "validation_loss_by_domain": {"a": 1.5},
        },
        read=lambda path: list(read_metrics(path)),
        accepts={
            "": MORE_KEYS,
            "validation_loss": MAYBE,
            "validation_loss_by_domain": frozenset({"missing", "unknown key"}),
            "validation_loss_by_domain.a": MAYBE,
        },
        is_line=True,
    ),
    "loads line": Record(
        file="loads.jsonl",
        sample={"step": 1, "tokens": 2, "layers": {"0": [1, 2], "1": [3, 4]}},
        read=lambda path: list(read_loads(path)),
        accepts={"": MORE_KEYS, "layers.0": frozenset({"missing"}), "layers.1": frozenset({"missing"})},
        is_line=True,
    ),
    "summary": Record(
        file="summary.json",
        sample={
            "finished": True,
            "steps": 10,
            "tokens": 20,
            "parameters": 30,
            "tokens_per_second": {"before": 1.5, "after": 2.5},
            "validation_loss": 1.5,
            "validation_loss_by_domain": {"a": 1.5},
            "seconds": 1.5,
            "peak_memory_bytes": 10,
        },
        read=read_summary,
        accepts={
            "": MORE_KEYS,
            "tokens_per_second": MORE_KEYS | {"object"},
            **dict.fromkeys(("tokens_per_second.before", "tokens_per_second.after", "validation_loss"), MAYBE),
            **dict.fromkeys(("validation_loss_by_domain.a", "seconds", "peak_memory_bytes"), MAYBE),
            "validation_loss_by_domain": frozenset({"missing", "unknown key"}),
        },
    ),
    "packed tokens": Record(
        file="train.safetensors",
        sample={"format": "secateur-tokens", "version": 1, "num_documents": 1}
        | {"num_dropped": 0, "tokens_by_domain": {"a": 4}},
        read=PackedTokens.load,
        accepts={
            "": MORE_KEYS,
            "tokens_by_domain": MORE_KEYS,
            "tokens_by_domain.a": frozenset({"missing"}),
        },
        write=write_packed,
    ),
    "load history": Record(
        file="trainer_state.json",
        sample={"stride": 1, "marks": [{"windows": 0, "tokens": 0, "sums": {"0": [0, 0]}}]},
        read=read_json_text(LoadHistory().restore),
        accepts={
            "": MORE_KEYS,
            "marks": frozenset({"missing"}),
            "marks[0]": MORE_KEYS,
            "marks[0].sums": frozenset({"missing"}),
            "marks[0].sums.0": frozenset({"missing"}),
        },
    ),
    "unpruned": Record(
        file="unpruned.json",
        sample={"step": 20, "waits_for": "moving", "dropped": {"0": [1]}, "rerouted_share": 0.5},
        read=read_unpruned,
        accepts={
            "": MORE_KEYS,
            "waits_for": TEXTS,
            "dropped": frozenset({"null"}),
            "dropped.0": frozenset({"missing"}),
            "rerouted_share": NUMBERS | {"null"},
        },
    ),
    "facts of a model": Record(
        file="facts.json",
        sample=FACTS,
        read=read_json_text(ModelFacts.from_json),
        accepts={"model_type": TEXTS, "digest": TEXTS, "has_one_count": frozenset({"true"})},
    ),
    "prepared data": Record(
        file="data.json",
        sample={
            "format": "secateur-data",
            "version": 1,
            "train": {"file": "train.safetensors", "digest": "0f"},
            "validation": {"prose": {"file": "validation-prose.safetensors", "digest": "0f"}},
            "report": {"documents": 1},
        },
        read=read_prepared,
        accepts={
            "report": frozenset({"object", "unknown key"}),
            "report.": ANYTHING,
            "validation.prose": frozenset({"missing"}),
            "train.digest": TEXTS,
            "validation.prose.digest": TEXTS,
        },
    ),
    "undo": Record(
        file="undo.json",
        sample=UNDO,
        read=lambda path: read_undo(path.parent),
        accepts=PLAN_INSIDE
        | {
            "mtp": frozenset({"null"}),
            "dropped[0]": frozenset({"text"}),
            "weights.b.safetensors": GONE,
            "weights.b.safetensors.sha256": TEXTS,
            "replaced[0]": frozenset({"text"}),
            "copied.more/tokenizer.json": TEXTS | GONE,
            "seal": frozenset({"null"}),
        },
    ),
    "undo, sealed": Record(
        file="undo.json",
        sample=sealed(UNDO | {"version": 2, "replaced": {"config.json": "ab"}}),
        read=lambda path: read_undo(path.parent),
        accepts={},
        every=3,
    ),
    "names of an engine": Record(
        file="engine.json",
        sample={
            "format": "secateur-names",
            "version": 1,
            "blocks": ["{prefix}layers.{layer}.moe"],
            "routers": {"gate.weight": {"dim": 0, "rows": 1, "num_trailing": 0}},
            "experts": {"w1": {"dim": 1, "rows": 5, "num_trailing": 2}},
            "counters": ["c"],
            "whole": ["shared.*"],
            "outside": ["*.mtp"],
            "optimizer": ["optim.{name}.{key}"],
            "settings": ["groups.{name}.{key}"],
        },
        read=read_naming,
        accepts=dict.fromkeys(("counters", "whole", "outside", "optimizer", "settings"), GONE)
        | {f"{name}[0]": TEXTS for name in ("counters", "whole", "outside")}
        | dict.fromkeys(("routers.gate.weight", "experts.w1"), GONE)
        | {f"{name}.{part}": GONE for name in ("routers.gate.weight", "experts.w1") for part in ("dim", "num_trailing")}
        | {f"{name}.rows": OPTIONAL for name in ("routers.gate.weight", "experts.w1")},
    ),
    "loads": Record(
        file="loads.json",
        sample={"0": [3, 1.5], "2": [1]},
        read=read_placement_loads,
        accepts={"0": GONE, "2": GONE, "0[0]": frozenset({"1.5"}), "2[0]": frozenset({"1.5"})},
    ),
    "a window of loads": Record(
        file="loads.jsonl",
        sample={"step": 3, "tokens": 30, "layers": {"0": [3, 1.5]}},
        read=read_placement_loads,
        accepts={
            "": MORE_KEYS,
            "step": ANYTHING - NOT_FINITE,
            "tokens": ANYTHING - NOT_FINITE,
            "layers.0[0]": frozenset({"1.5"}),
        },
        is_line=True,
    ),
    "a fine-tuning": Record(
        file="finetune.json",
        sample=FINETUNED,
        read=read_finetuned,
        accepts=OPTIONS_ACCEPTS
        | dict.fromkeys(("secateur", "name", "source", "model_type"), TEXTS)
        | dict.fromkeys(("data", "hardware"), IS_FREE)
        | {f"{name}.": ANYTHING for name in ("data", "hardware")}
        | {f"evaluations[0].{name}": OPTIONAL | NUMBERS for name in ("accuracy", "domains.all.accuracy")}
        | {f"evaluations[0].{name}": NUMBERS for name in ("loss", "domains.all.loss")}
        | {f"losses[0].{name}": NUMBERS | {"null"} for name in ("learning_rate", "grad_norm")}
        | {
            "experts.0": GONE,
            "router_aux_loss": MORE_KEYS | {"null"},
            "router_aux_loss.": TEXTS | NUMBERS | GONE,
            "epochs": NUMBERS,
            "seconds": NUMBERS,
            "versions.torch": TEXTS | GONE,
            "losses[0].loss": NUMBERS,
            "evaluations[0].domains.all": GONE,
            "resumed_after_step": frozenset({"null"}),
            "tokens_per_second": NUMBERS | OPTIONAL,
        },
    ),
    "time of a fine-tuning": Record(
        file="spent.json",
        sample={"items": 3, "seconds": 1.5},
        read=read_spent,
        accepts={"items": GONE, "seconds": GONE | NUMBERS},
    ),
    "what a pruning was asked for": Record(
        file=NOTE,
        sample=ASKED,
        read=read_note(pruning.Asked),
        is_required=False,
        accepts=dict.fromkeys(("model", "choice"), IS_FREE)
        | {name: IS_FREE | {"null"} for name in ("pretrained", "data")}
        | {f"{name}.": ANYTHING for name in ("model", "choice", "pretrained", "data")}
        | {name: TEXTS | {"null"} for name in ("undo", "mtp")},
    ),
    "what a fine-tuning was asked for": Record(
        file=NOTE,
        sample={"model": FREE, "data": FREE, "options": OPTIONS},
        read=read_note(finetuning.Asked),
        is_required=False,
        accepts=OPTIONS_ACCEPTS | {"model": IS_FREE, "model.": ANYTHING, "data": IS_FREE, "data.": ANYTHING},
    ),
    "what an observation was asked for": Record(
        file=RUN,
        sample=FREE,
        read=read_note(dict[str, Any]),
        is_required=False,
        accepts={"": IS_FREE, "files": ANYTHING, "files.": ANYTHING},
    ),
    "stage of an observation": Record(
        file="stage.json",
        sample={"stage": 2, "form": "tuple 2", "sha256": {"0": "ab"}},
        read=lambda path: DiskStates(path.parent),
        accepts={"sha256": GONE, "sha256.0": GONE | {"text"}},
        is_required=False,
    ),
    "a layer of an observation": Record(
        file="0.safetensors",
        sample=LAYER_HEADER,
        read=lambda path: WorkFolder(path.parent / "out").load_layer(0),
        write=write_layer,
    ),
    "seal of a checkpoint": Record(
        file="complete.json",
        sample={"format": "secateur-checkpoint", "run": "a", "sizes": {"a": 10, "b/c": 0}},
        read=lambda path: read_seal(path.parent),
        accepts={"": MORE_KEYS, "run": TEXTS, "sizes": MORE_KEYS, "sizes.a": GONE, "sizes.b/c": GONE},
    ),
    "report of apply": Record(
        file="report.json",
        sample={"plan": PLAN, "mtp": "drop"},
        read=read_applied,
        accepts=PLAN_INSIDE | {"": MORE_KEYS, "mtp": OPTIONAL},
    ),
    "verify": Record(
        file="verify.json",
        sample={
            "format": "secateur-verify",
            "version": 1,
            "source": "a",
            "pruned": "b",
            "passed": True,
            "checks": [{"claim": "c", "passed": None, "detail": "d"}],
        },
        read=read_verified,
        accepts=dict.fromkeys(("source", "pruned", "checks[0].claim", "checks[0].detail"), TEXTS)
        | {"checks[0].passed": frozenset({"true"})},
    ),
    "header of weights": Record(
        file="model.safetensors",
        sample={
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "I16", "shape": [1, 2], "data_offsets": [0, 4]},
            "b": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]},
        },
        read=read_header,
        is_required=False,
        accepts={"__metadata__": GONE, "__metadata__.format": TEXTS | GONE},
        write=write_as_header,
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_whole_record_is_read(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    record.write(tmp_path / record.file, json.dumps(record.sample).encode() + b"\n" * record.is_line)
    record.read(tmp_path / record.file)


@pytest.mark.parametrize("name", RECORDS)
def test_every_damage_is_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    path = tmp_path / record.file
    wrong = []
    for place, damage, text in itertools.islice(damaged_json(record.sample), 0, None, record.every):
        record.write(path, text + b"\n" * record.is_line)
        try:
            record.read(path)
        except SecateurError as error:
            if record.file not in str(error) or "\n" in str(error) or len(str(error)) > 2000:
                wrong.append((place, damage, f"the message is {error!r:.200}"))
        except Exception as error:
            wrong.append((place, damage, f"ends in {error!r:.200}"))
        else:
            if not record.is_accepted(place, damage):
                wrong.append((place, damage, "is read"))
    assert not wrong


@pytest.mark.parametrize("name", [name for name in RECORDS if RECORDS[name].is_required])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=re.escape(RECORDS[name].file)):
        RECORDS[name].read(tmp_path / RECORDS[name].file)
