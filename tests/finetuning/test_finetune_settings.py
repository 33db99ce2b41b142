"""Options of a fine-tuning are taken apart once, and its model is described once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from secateur.errors import SecateurError
from secateur.finetuning import model as model_module
from secateur.finetuning import run as program
from secateur.finetuning.options import NOT_FOR, FinetuneOptions, in_parts
from secateur.finetuning.trainer import FinetuneLog, TrainingTime
from secateur.train import training_log
from support.small_finetunes import run, text_folder, text_options

# another value than the default, where adding one to it makes none
OTHERS: dict[str, dict[str, Any]] = {
    "data": {"data": ("b.txt",)},
    "eval_data": {"eval_data": ("c.txt",)},
    "text_key": {"text_key": "body"},
    "split": {"split": "test"},
    "optimizer": {"optimizer": "sgd"},
    "schedule": {"schedule": "linear"},
    "freeze": {"freeze": ("gate",)},
    "eval_steps": {"eval_data": ("c.txt",), "eval_steps": 3},
    "sequence_length": {"sequence_length": 64},
    "report_to": {"report_to": "wandb"},
}


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "an option": ({"options": FinetuneOptions(data=("a.txt",), seed=7)}, r"--seed is 0, but .* 7 \(options\.seed in "),
    "a value": ({"model": {"path": "a", "files": {}}}, r"model\.files in \S+ is \{\}, expected \{'x': \[1, 2\]\}"),
    "a key that is gone": ({"data": {}}, r"data\.train in \S+ is None, expected \['a'\]"),
    "a key more": ({"data": {"train": ["a"], "more": 1}}, r"data\.more in \S+ is 1, expected None"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_note_that_says_another_thing_is_named_with_its_field(damage: str) -> None:
    asked = program.Asked(
        model={"path": "a", "files": {"x": [1, 2]}}, data={"train": ["a"]}, options=FinetuneOptions(data=("a.txt",))
    )
    changes, message = DAMAGES[damage]
    noted = Path(".out.finetuning/asked.json")
    program._check_same(asked, asked, noted)
    with pytest.raises(SecateurError, match=message) as refused:
        program._check_same(msgspec.structs.replace(asked, **changes), asked, noted)
    assert str(noted) in str(refused.value)


@pytest.mark.parametrize("name", [field.name for field in fields(FinetuneOptions)])
def test_every_option_has_its_place_in_the_settings(name: str) -> None:
    default = FinetuneOptions(data=("a.txt",))
    before = getattr(default, name)
    other = (not before) if isinstance(before, bool) else (before or 1) + 1 if name not in OTHERS else None
    changed = FinetuneOptions(**{"data": ("a.txt",), **OTHERS.get(name, {name: other})})
    assert getattr(changed, name) != before
    settings = in_parts(changed)
    parts = [getattr(settings, part.name) for part in fields(settings)]
    values = [getattr(part, name) for part in parts if hasattr(part, name)]
    assert values == [getattr(changed, name)] * len(values) != []


def test_all_options_are_recorded_as_they_were_given() -> None:
    options = FinetuneOptions(data=("a.txt",), freeze=("gate",), epochs=1.5)
    assert in_parts(options).record.options == options.to_json()


def test_what_is_not_for_a_modality_are_options() -> None:
    assert {name for names in NOT_FOR.values() for name in names} < {field.name for field in fields(FinetuneOptions)}


def test_a_finetuning_with_a_loss_of_the_routers_describes_its_model_once_and_its_options_are_taken_apart_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = text_folder(tmp_path)
    described: list[Any] = []
    taken: list[Any] = []
    describe = model_module.describe_moe
    monkeypatch.setattr(model_module, "describe_moe", lambda model: described.append(model) or describe(model))
    monkeypatch.setattr(program, "in_parts", lambda options: taken.append(options) or in_parts(options))
    assert not hasattr(program, "describe_moe")
    record = run(root, tmp_path / "out", text_options(root, router_aux_loss=0.01))
    assert record["router_aux_loss"] == {"from": "option", "router_aux_loss": 0.01}
    assert len(described) == len(taken) == 1


def test_the_seconds_of_a_finetuning_are_those_from_the_begin_of_each_step_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = SimpleNamespace(seconds=10.0)
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now.seconds)
    spent = TrainingTime(seconds=5.0)
    task: Any = SimpleNamespace(set_epoch=lambda epoch: None)
    log: Any = FinetuneLog(task, run="r", steps_per_epoch=9, spent=spent, on_progress=lambda *done: None)
    for step in (1, 2):
        log.on_step_begin(None, SimpleNamespace(global_step=step - 1), None)
        now.seconds += 2.0
        log.on_step_end(None, SimpleNamespace(global_step=step, max_steps=2), None)
        now.seconds += 100.0  # until the next batch is there
    assert spent.seconds == 9.0
