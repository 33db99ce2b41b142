"""All ways to ask for a pruning rule, from Python and from the command line, and what arrives."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from typer.main import get_command

from secateur import LAEP, LAEPCallback, RouterStats, Rule
from secateur.cli import app
from secateur.decide.model_facts import ModelFacts
from secateur.decide.rules import OPTIONS
from secateur.model_folder import stages as program
from secateur.observation.observation import Observation
from secateur.pretraining.options import PretrainOptions, parse_pruning
from secateur.train.schedule import as_prunings
from support.small_corpus import write_corpus
from support.small_runs import arguments, options
from support.tiny_models import tiny_model

LOADS = {0: [10, 20, 30, 40], 3: [20, 10, 4, 2]}
Found = dict[str, Any]  # a rule as JSON


def command(*words: str) -> str:
    """What `secateur WORDS` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        get_command(app).main([*words], prog_name="secateur", standalone_mode=False)
    return printed.getvalue()


def statistics_in(folder: Path) -> Path:
    """A statistics file of two layers of four experts, of a model of 2000 bytes with experts of 50."""
    facts = ModelFacts(
        model_type="qwen3_moe",
        digest="d",
        top_k=2,
        num_groups=1,
        min_experts=2,
        total_bytes=2000,
        has_one_count=False,
        num_experts=dict.fromkeys(LOADS, 4),
        bytes_per_expert=dict.fromkeys(LOADS, 50),
    )
    stats = RouterStats.from_loads(LOADS, 50)
    Observation(stats=stats, model=facts, data={}).save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


def plan(folder: Path, name: str, value: float) -> Found:
    """The plan that `secateur plan` makes of `statistics_in`."""
    words = ["plan", str(statistics_in(folder)), OPTIONS[name].flag, str(value), "--dry-run", "--json"]
    found: Found = json.loads(command(*words))["plan"]
    return found


def begun(callback: LAEPCallback, model: PreTrainedModel, folder: Path) -> LAEP:
    """The pruner of a callback whose training has begun."""
    callback.on_train_begin(
        TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[]),
        TrainerState(),
        TrainerControl(),
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
    )
    assert callback.pruner is not None
    callback.pruner.detach()
    return callback.pruner


def _of_laep(folder: Path, name: str, value: float) -> Found:
    model = tiny_model("mixtral")
    pruner = LAEP(model, torch.optim.AdamW(model.parameters()), **{name: value})
    pruner.detach()
    return pruner.prunings[0].rule.to_json()


def _of_callback(folder: Path, name: str, value: float) -> Found:
    return begun(LAEPCallback(**{name: value}), tiny_model("mixtral"), folder).prunings[0].rule.to_json()


def _of_options(folder: Path, name: str, value: float) -> Found:
    saved = json.dumps(PretrainOptions(**{name: value}).to_json(), allow_nan=False)
    return PretrainOptions.from_json(json.loads(saved)).prunings()[0].rule.to_json()


def _of_pretrain(folder: Path, name: str, value: float) -> Found:
    corpus = folder / "corpus"
    words = arguments(options(corpus if corpus.exists() else write_corpus(corpus)))
    printed = command(
        "pretrain", "--out", str(folder / "run"), *words, OPTIONS[name].flag, str(value), "--dry-run", "--json"
    )
    found: Found = json.loads(printed)["prunings"][0]["rule"]
    return found


def _of_prune(folder: Path, name: str, value: float) -> Found:
    class AskedError(Exception):
        pass

    with mock.patch.object(program, "run_stages", side_effect=AskedError) as called, contextlib.suppress(AskedError):
        command("prune", str(folder), "--out", str(folder / "out"), OPTIONS[name].flag, str(value))
    found: Found = called.call_args.args[2].rule.to_json()
    return found


# how a rule is asked for -> (a folder to work in, option, value) -> the rule that arrives
WAYS: dict[str, Callable[[Path, str, float], Found]] = {
    "Rule": lambda folder, name, value: Rule(**{name: value}).to_json(),
    "as_prunings": lambda folder, name, value: as_prunings(None, **{name: value})[0].rule.to_json(),
    "LAEP": _of_laep,
    "LAEPCallback": _of_callback,
    "PretrainOptions": _of_options,
    "--prune": lambda folder, name, value: parse_pruning(f"step=4 {name}={value}").rule.to_json(),
    "secateur pretrain": _of_pretrain,
    "secateur plan": lambda folder, name, value: plan(folder, name, value)["details"]["rule"],
    "secateur prune": _of_prune,
}
