"""What loggers get: flat numbers, at the steps where the Trainer logs and at a pruning, in TensorBoard's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import secateur
from secateur.plans import Plan
from secateur.train.load_callback import LoadCallback
from secateur.train.loggers import log, trainer_with
from secateur.train.numbers import load_numbers
from support.event_files import scalars
from support.small_trainers import laep, losses, same_weights, trainer_of
from support.tiny_models import tiny_model

LOADS = {0: [4, 0, 0, 0], 3: [1, 1, 1, 1], 7: [0, 2, 1, 1], 9: [3, 0, 0, 1]}


def test_numbers_of_loads_are_those_worked_out_by_hand() -> None:
    numbers = load_numbers(LOADS)
    ratios = [4.0, 1.0, 2.0, 3.0]
    assert numbers["laep/max_over_mean"] == 2.5
    assert (numbers["laep/max_over_mean/min"], numbers["laep/max_over_mean/max"]) == (1.0, 4.0)
    assert numbers["laep/max_over_mean/p50"] == 2.5
    assert numbers["laep/max_over_mean/p75"] == 3.25
    assert numbers["laep/max_over_mean/p90"] == pytest.approx(3.7)
    assert numbers["laep/max_over_mean/p95"] == np.percentile(ratios, 95)
    assert numbers["laep/dead_experts"] == 3 + 0 + 1 + 2
    assert len(numbers) == 8, "few enough for a model of sixty layers"


def test_layers_are_there_on_request() -> None:
    numbers = load_numbers(LOADS, by_layer=True)
    assert numbers["laep/max_over_mean/layer_7"] == 2.0
    assert numbers["laep/dead_experts/layer_9"] == 2
    assert {name: numbers[name] for name in load_numbers(LOADS)} == load_numbers(LOADS)


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


def test_a_pruning_and_its_loads_are_seen_in_tensorboard(tmp_path: Path, tensorboard: Path) -> None:
    callback = laep(by_layer=True)
    trainer = trainer_of(tmp_path, callback, report_to="tensorboard", max_steps=5, logging_steps=5)
    trainer.train()
    (event,) = callback.events
    found = scalars(tensorboard)
    assert set(found["train/laep/experts"]) == {2, 5}, "at the pruning and where the Trainer logs"
    assert found["train/laep/experts"][2] == event.experts_after
    assert found["train/laep/parameters"][5] == trainer.model.num_parameters()
    assert found["train/laep/rerouted_share"][2] == pytest.approx(event.rerouted_share)
    assert found["train/laep/waits_for"] == {2: 6, 5: 6}, "pruned"
    assert set(found["train/laep/max_over_mean/layer_1"]) == {5}, "a full window since the pruning"
    assert set(found["train/loss"]) == {5}, "the Trainer's own logs stay where they were"
    assert any("laep/experts" in entry and entry["step"] == 2 for entry in trainer.state.log_history)


def test_the_plan_is_in_a_file_and_an_attribute(tmp_path: Path) -> None:
    callback = laep()
    assert callback.plan is None
    trainer_of(tmp_path, callback).train()
    assert callback.plan is not None
    assert callback.plan.layers == callback.events[0].plan.layers
    assert Plan.load(tmp_path / "laep_plan.json") == callback.plan


def test_a_run_that_is_only_counted_is_the_same_run_and_its_loads_are_logged(tmp_path: Path, tensorboard: Path) -> None:
    alone = trainer_of(tmp_path)
    alone.train()
    callback = LoadCallback(window_steps=2)
    counted = trainer_of(tmp_path, callback, report_to="tensorboard")
    counted.train()
    assert losses(counted) == losses(alone)
    assert same_weights(counted.model, alone.model)
    found = scalars(tensorboard)
    assert set(found["train/laep/experts"]) == {1, 2, 3, 4}
    assert set(found["train/laep/dead_experts"]) == {2, 3, 4}
    assert found["train/laep/tokens"] == {1: 0, 2: 2 * 4 * 8, 3: 2 * 4 * 8, 4: 4 * 4 * 8}
    assert not any("layer_" in name for name in found)
    assert secateur.LoadCallback is LoadCallback


def test_an_optimizer_without_a_rule_will_do_where_nothing_is_pruned(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    trainer = trainer_of(tmp_path, LoadCallback(window_steps=2), model=model)
    trainer.optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "laep/max_over_mean/p95" in entry]
    assert [entry["step"] for entry in entries] == [2, 3, 4]


def test_a_callback_that_no_trainer_calls_still_has_its_history() -> None:
    state: Any = type("State", (), {"epoch": None, "log_history": [], "global_step": 3})
    assert trainer_with(TrainerCallback()) is None
    log({"laep/experts": 5}, None, None, state, None)  # type: ignore[arg-type]
    assert state.log_history == [{"laep/experts": 5, "step": 3}]
