"""LAEP in transformers' Trainer: trained twice, the best model loaded back, saves that others ask for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.train.load_callback import LoadCallback
from support.small_trainers import laep, same_weights, trainer_of
from support.tiny_models import random_tokens, tiny_model

EVERY_STEP: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


class Score(TrainerCallback):
    """Makes one step the best."""

    def __init__(self, best: int) -> None:
        self.best = best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_score"] = -abs(state.global_step - self.best)


@pytest.mark.parametrize("best", [1, 3], ids=["before the pruning", "after it"])
def test_the_best_checkpoint_is_loaded_back_with_its_experts_and_shape(best: int, tmp_path: Path) -> None:
    said: list[str] = []
    callback = laep(on_message=said.append)
    trainer = trainer_of(tmp_path, callback, Score(best), **EVERY_STEP)
    parameters = list(trainer.model.parameters())
    trainer.train()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert type(trainer.model).__name__ == type(expected).__name__
    assert same_weights(trainer.model, expected)
    assert torch.equal(logits_of(trainer.model, random_tokens(2, 8)), logits_of(expected, random_tokens(2, 8)))
    assert all(one is other for one, other in zip(parameters, trainer.model.parameters(), strict=True))
    assert f"the best checkpoint is checkpoint-{best}, at step {best} of 4: the model is that again" in said[-1]
    assert ("with 24 experts instead of" in said[-1]) == (best == 1)
    assert trainer.args.load_best_model_at_end
    assert len(callback.events) == (best == 3)
    trainer.save_model(str(tmp_path / "final"))
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), expected)
    trainer.args.max_steps = 2  # and training can go on from there: pruned at step 2 where that is still to come
    trainer.train()
    assert [event.step for event in callback.events] == [2]


def test_early_stopping_across_a_pruning_gives_the_best_model(tmp_path: Path) -> None:
    callback = laep()
    trainer = trainer_of(tmp_path, callback, Score(1), EarlyStoppingCallback(2), max_steps=8, **EVERY_STEP)
    trainer.train()
    assert trainer.state.global_step == 3
    assert set(describe_moe(trainer.model).counts.values()) == {8}


def test_the_best_of_a_model_with_adapters_cannot_be_put_back_and_is_refused_at_the_start(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.peft_config = {}
    trainer = trainer_of(tmp_path, laep(), **EVERY_STEP)
    with pytest.raises(SecateurError, match=r"TrainingArguments\.load_best_model_at_end cannot be used with expert"):
        laep().on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=None)


def test_a_second_training_of_the_same_model_goes_on_from_the_first(tmp_path: Path) -> None:
    callback = laep(at_step=3)
    trainer = trainer_of(tmp_path, callback, max_steps=4)
    trainer.train()
    (first,) = callback.events
    trainer.train()
    assert callback.events == [first]  # pruned once
    assert callback.pruner is not None
    assert callback.pruner.num_steps == 8
    assert callback.pruner.phase == "pruned"


class Interrupts(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_after_an_interrupted_training_a_new_trainer_begins_on_the_same_model(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    callbacks = [laep(), LoadCallback(), laep()]
    for callback in callbacks[:2]:
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tmp_path, callback, Interrupts(), model=model).train()
    trainer_of(tmp_path, callbacks[2], model=model).train()
    assert [event.step for event in callbacks[2].events] == [2]
    assert not model.base_model._forward_pre_hooks


def test_two_callbacks_of_one_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="watched by another LAEP already"):
        trainer_of(tmp_path, laep(), LoadCallback()).train()


def test_a_pruning_that_did_not_come_in_the_first_training_comes_in_the_second(tmp_path: Path) -> None:
    callback = laep(at_step=6)
    trainer = trainer_of(tmp_path, callback, max_steps=4)
    trainer.train()
    assert callback.events == []
    trainer.train()
    (event,) = callback.events
    assert (event.step, event.tokens) == (6, 6 * 4 * 8)


class Asks(TrainerCallback):
    """Wants a checkpoint, after everybody else was asked."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 3


def test_a_checkpoint_that_another_callback_asks_for_is_written_in_a_job_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    callback = laep(on_message=said.append)
    trainer = trainer_of(tmp_path, callback, Asks())
    monkeypatch.setattr(type(callback), "_collect", lambda self, control: None)
    whole = copy.deepcopy(callback)
    trainer.add_callback(Several(callback))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["LAEPCallback"]["attributes"]["pruner_state"]
    assert (saved["num_steps"], saved["watch"]["open_window"], saved["watch"]["steps_in_window"]) == (3, None, 0)
    assert any("was asked for by a callback after LAEPCallback: it is whole" in line for line in said)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    trainer_of(tmp_path, whole, model=again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [event.step for event in whole.events] == [2]


class Several(TrainerCallback):
    """Lets the callback take the job for one of two processes once it runs."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pruner = self.callback.pruner
        pruner.__class__ = type("OfTwo", (type(pruner),), {"num_processes": property(lambda self: 2)})
