"""Runs of `secateur pretrain` of about a second: a tiny model on a small corpus, and what two runs must share."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run import run_pretraining
from secateur.reporting.numbers import report_json
from secateur.reporting.run_data import read_run
from support.fork_server import context
from support.small_corpus import write_corpus

Json = dict[str, Any]

gc.freeze()  # accelerate collects garbage in every run; what the imports made need not be looked at each time

QWEN3_MOE: Json = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 8,
    "moe_intermediate_size": 16,
    "intermediate_size": 32,
}
MIXTRAL: Json = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 8,
    "intermediate_size": 16,
}
DEEPSEEK_V3: Json = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "intermediate_size": 32,
}
TINY = {"qwen3_moe": QWEN3_MOE, "mixtral": MIXTRAL, "deepseek_v3": DEEPSEEK_V3}
SMALL: Json = {
    "vocab_size": 300,
    "sequence_length": 32,
    "batch_size": 4,
    "steps": 40,
    "warmup_steps": 4,
    "log_steps": 5,
    "eval_steps": 20,
    "save_steps": 20,
    "window_steps": 4,
    "threads": 1,
}
# constants of the detector that all loads meet, so that it fires after five windows
LOOSE: Json = {"max_regret": 1.0, "max_noise": 1.0, "min_change": 0.0, "min_windows": 5}
STRICT: Json = {"min_change": 1.0, "min_windows": 5}  # constants that no loads meet
# what a clock or the machine decides
TIMINGS = {"seconds", "tokens_per_second", "surgery_seconds", "peak_memory_bytes"}
STARTED = {"command"}  # by whom
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def corpus_in(factory: pytest.TempPathFactory) -> Path:
    """One corpus a test session."""
    folder = factory.getbasetemp() / "corpus"
    return folder if folder.exists() else write_corpus(folder)


def run_in(factory: pytest.TempPathFactory) -> Path:
    """One finished run a test session: pruned at step 23 of 40, with a control run and the real report."""
    folder = factory.getbasetemp() / "finished-run"
    if not folder.exists():
        run_pretraining(options(corpus_in(factory), control=True), folder)
    return folder


def data_in(corpus: Path) -> tuple[str, ...]:
    return (str(corpus / "prose"), str(corpus / "code"))


def options(
    corpus: Path, *, preset: str = "qwen3_moe", overrides: Json | None = None, **changes: Any
) -> PretrainOptions:
    """A run of a few tenths of a second that prunes at step 23, within a window and between two checkpoints."""
    times = {} if {"prune", "no_prune", "prune_at_tokens", *LOOSE} & set(changes) else {"prune_at_step": 23}
    fields = {"data": data_in(corpus), "preset": preset, **SMALL, **times, **changes}
    if {"config", "model"} & set(changes):
        del fields["preset"]
        return PretrainOptions(**fields)
    return PretrainOptions(**fields, overrides={**TINY[preset], **(overrides or {})})


def arguments(settings: PretrainOptions) -> list[str]:
    """The command line that gives `settings`."""
    words = []
    for name, value in settings.to_json().items():
        flag = f"--{name.replace('_', '-')}"
        if name == "overrides":
            words += [word for key, one in value.items() for word in ("--set", f"{key}={json.dumps(one)}")]
        elif value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [word for one in value for word in (flag, one)]
        elif value not in (None, False):
            words += [flag, str(value)]
    return words


def light_report(folder: Path) -> Path:
    """report.json without the figures, which take longer than a tiny run."""
    (folder / "report.json").write_text(json.dumps(report_json(read_run(folder))))
    return folder / "report.html"


def lines(path: Path) -> list[Json]:
    """Strict JSON lines: NaN and Infinity are errors."""
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def strict(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timings(one) for key, one in value.items() if key not in TIMINGS | STARTED}
    return [without_timings(one) for one in value] if isinstance(value, list) else value


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, equal to the last bit in everything that no clock decides."""
    files, others = files_of(one), files_of(other)
    assert files.keys() == others.keys()
    for name, content in files.items():
        assert content == others[name], name


def files_of(folder: Path) -> dict[str, Any]:
    """Content by name: bytes, or JSON without what a clock decides, who started the run, and pages that show clocks."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("checkpoints", "control/checkpoints")):
            continue  # a test kept them, and torch.distributed.checkpoint writes metadata in any order
        if path.is_dir() or name.startswith("figures/") or path.suffix == ".html":
            found[name] = ""
        elif path.suffix == ".jsonl":
            found[name] = without_timings(lines(path))
        elif path.suffix == ".json" and not name.startswith("data/") and path.name not in MODEL_FILES:
            found[name] = without_timings(strict(path))
        else:
            found[name] = path.read_bytes()
    return found


def in_child(target: Callable[..., None], *values: Any, stderr: Path | None = None) -> int:
    """Run `target` in a process of its own; returns its exit code, -9 for SIGKILL.

    Children are forked from a process that has imported everything and done nothing, so they start at once.
    """
    process = context().Process(target=_call, args=(target, values, stderr))
    process.start()
    process.join(900)
    if process.is_alive():
        process.kill()
        raise AssertionError("the child hangs")
    assert process.exitcode is not None
    return process.exitcode


def _call(target: Callable[..., None], values: tuple[Any, ...], stderr: Path | None) -> None:
    if stderr is not None:
        descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for the rest of the process
    target(*values)
