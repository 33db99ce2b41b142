"""LAEPCallback in transformers' own Trainer."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from secateur import LAEPCallback, PhaseConstants, PruneEvent, Pruning, Rule, SecateurError
from secateur.families import describe_moe
from secateur.train.callback import REFUSED_ARGUMENTS
from support.tiny_models import everything, tiny_model

STEPS, BATCH, LENGTH = 10, 4, 8


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    """A Trainer collects garbage at every start; leave out the many objects of imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


PHASE = PhaseConstants(max_regret=1.0, max_noise=1.0, min_change=0.0, min_windows=5)


def dataset() -> list[dict[str, Tensor]]:
    """Rows of one word in two, the next word always the one after: something to learn, with a skew in the words."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(STEPS * BATCH * 2):
        start = int(torch.randint(1, 12, (1,), generator=generator) ** 1.4)
        row = (torch.arange(LENGTH) + start) % 40 + 1
        rows.append({"input_ids": row, "labels": row})
    return rows


class Seen:
    """What the model was given in training, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[list[list[int]]] = []
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.batches.append(kwargs["input_ids"].tolist())


def trainer_of(
    folder: Path,
    *callbacks: TrainerCallback,
    model: PreTrainedModel | None = None,
    name: str = "mixtral",
    collator: Callable[..., Any] = default_data_collator,
    of: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    fixed = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return of(
        model=tiny_model(name, attention_dropout=0.1) if model is None else model,
        args=TrainingArguments(**fixed, **settings | arguments),
        train_dataset=dataset(),
        eval_dataset=dataset()[:4],
        data_collator=collator,
        callbacks=list(callbacks),
    )


def laep(**settings: Any) -> LAEPCallback:
    defaults = {"window_steps": 2, "phase": PHASE}
    if "prunings" not in settings:
        defaults |= {"target_params": 0.8, "at_step": 5}
    return LAEPCallback(**defaults | settings)


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def without_clock(event: PruneEvent) -> dict[str, Any]:
    return event.to_json() | {"surgery_seconds": None}


def expert_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    return {
        name: parameter.detach().float().numpy().tobytes()
        for name, parameter in model.named_parameters()
        if ".experts." in name or ".gate." in name
    }


def test_it_prunes_reports_logs_and_training_goes_on(tmp_path: Path) -> None:
    told: list[PruneEvent] = []
    callback = laep(on_event=told.append)
    trainer = trainer_of(tmp_path, callback)
    size = trainer.model.num_parameters()
    trainer.train()
    (event,) = callback.events
    assert told == [event]
    assert (event.step, event.reason, event.tokens) == (5, "step", 5 * BATCH * LENGTH)
    assert trainer.model.num_parameters() == event.parameters_after <= 0.8 * size
    assert [entry["prune_event"] for entry in trainer.state.log_history if "prune_event" in entry] == [event.to_json()]
    assert trainer.state.global_step == STEPS
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert trainer.evaluate()["eval_loss"] < logged(trainer, "loss")[0]
    assert not trainer.model._forward_pre_hooks, "the hooks are gone when training has ended"


def test_it_prunes_at_tokens_and_at_the_stable_phase_by_a_schedule(tmp_path: Path) -> None:
    schedule = [Pruning(rule=Rule(target_params=0.9), at_tokens=3 * BATCH * LENGTH), Pruning(rule=Rule(alpha=1.0))]
    callback = laep(prunings=schedule)
    trainer = trainer_of(tmp_path, callback, max_steps=16)
    trainer.train()
    first, second = callback.events
    assert (first.step, first.reason, second.reason) == (4, "tokens", "stable")
    assert second.step in (8, 10, 12, 14, 16)
    assert second.parameters_before == first.parameters_after
    assert callback.pruner is not None
    assert callback.pruner.phase == "pruned"


def test_the_trainers_schedule_is_known_ahead_and_phases_are_logged(tmp_path: Path) -> None:
    said: list[str] = []
    callback = laep(prunings=[Pruning(rule=Rule(target_params=0.9))], on_message=said.append)
    trainer = trainer_of(tmp_path, callback, max_steps=20, warmup_steps=13, lr_scheduler_type="linear")
    trainer.train()
    (event,) = callback.events
    assert (event.step, event.reason) == (16, "stable")
    changes = [(entry["step"], entry["laep/phase"]) for entry in trainer.state.log_history if "laep/phase" in entry]
    assert [step for step, _ in changes] == [10, 16]
    assert changes[0][1] == "warm-up"
    assert changes[1][1] == "pruned"
    assert said == []


def test_a_training_that_ends_before_it_is_stable_says_what_it_would_have_dropped(tmp_path: Path) -> None:
    said: list[str] = []
    callback = laep(prunings=[Pruning(rule=Rule(target_params=0.8))], on_message=said.append)
    trainer = trainer_of(tmp_path, callback, max_steps=12, warmup_steps=12)
    trainer.train()
    assert callback.events == []
    assert "rises up to step 12 of 12" in said[0]
    assert said[1].startswith("not pruned up to step 12: warm-up. Now ")
    (entry,) = [entry["laep/unpruned"] for entry in trainer.state.log_history if "laep/unpruned" in entry]
    assert entry["step"] == 12
    assert sum(map(len, entry["dropped"].values())) > 0


@pytest.mark.parametrize("goal", [{"max_rerouted": 0.1}, {"target_params": 0.7, "uniform": True}])
def test_goals(goal: dict[str, Any], tmp_path: Path) -> None:
    callback = laep(target_params=goal.pop("target_params", None), **goal)
    trainer = trainer_of(tmp_path, callback, max_steps=6)
    trainer.train()
    (event,) = callback.events
    if "max_rerouted" in goal:
        assert 0 < event.rerouted_share <= 0.1
    else:
        assert len(set(callback.pruner.moe.counts.values())) == 1  # type: ignore[union-attr]
        assert type(trainer.model).__name__ == "MixtralForCausalLM"


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"optim": "adamw_torch"},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "rmsprop": {"optim": "rmsprop"},
    "adafactor": {"optim": "adafactor"},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no clipping": {"max_grad_norm": 0.0},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


QUICK_SETTINGS = ("adamw_torch", "adafactor", "bf16", "accumulation", "checkpointing")


@pytest.mark.parametrize(
    "setting", [one if one in QUICK_SETTINGS else pytest.param(one, marks=pytest.mark.slow) for one in SETTINGS]
)
def test_every_supported_way_of_training_goes_on_learning_after_the_pruning(setting: str, tmp_path: Path) -> None:
    at_pruning: dict[str, bytes] = {}
    callback = laep(on_event=lambda event: at_pruning.update(expert_bytes(trainer.model)))
    trainer = trainer_of(tmp_path, callback, name="gpt_oss", **SETTINGS[setting])
    trainer.train()
    (event,) = callback.events
    factor = 2 if setting == "accumulation" else 1
    assert event.tokens == 5 * BATCH * LENGTH * factor
    assert all(sum(loads) == 2 * event.tokens for loads in event.loads.values())
    assert event.oracle_max_abs_difference == 0.0
    final = expert_bytes(trainer.model)
    assert final.keys() == at_pruning.keys()
    assert [name for name in final if final[name] == at_pruning[name]] == []
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_learning_rates_and_data_order_are_those_of_a_run_without_pruning(tmp_path: Path) -> None:
    seen, rates = [], []
    for number, callbacks in enumerate(([], [laep()])):
        trainer = trainer_of(tmp_path / str(number), *callbacks)
        seen.append(Seen(trainer.model))
        trainer.train()
        rates.append(logged(trainer, "learning_rate"))
    assert len(rates[0]) == len(seen[0].batches) == STEPS
    assert rates[0] == rates[1]
    assert seen[0].batches == seen[1].batches


def test_watching_changes_nothing(tmp_path: Path) -> None:
    finals = []
    for number, callbacks in enumerate(([], [LAEPCallback(prunings=[], window_steps=2)])):
        trainer = trainer_of(tmp_path / str(number), *callbacks)
        trainer.train()
        finals.append((logged(trainer, "loss"), trainer.model.state_dict()))
    assert finals[0][0] == finals[1][0]
    assert all(torch.equal(finals[0][1][key], finals[1][1][key]) for key in finals[0][1])


def test_padding_in_the_batches_is_not_counted(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = default_data_collator(rows)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -3:] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    callback = laep()
    trainer_of(tmp_path, callback, collator=collate).train()
    assert callback.events[0].tokens == 5 * BATCH * (LENGTH - 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, LAEPCallback]:
    """An uninterrupted run with two prunings and a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    callback = two_prunings()
    trainer = trainer_of(folder, callback, name="deepseek_v3", save_strategy="steps", save_steps=1)
    trainer.train()
    assert [event.step for event in callback.events] == [5, 8]
    return folder, trainer, callback


def two_prunings(**settings: Any) -> LAEPCallback:
    schedule = [Pruning(rule=Rule(target_params=0.85), at_step=5), Pruning(rule=Rule(alpha=1.0), at_step=8)]
    return laep(prunings=schedule, **settings)


def other_model() -> PreTrainedModel:
    """Of the run's family, with other weights and all experts."""
    return tiny_model("deepseek_v3", seed=1, attention_dropout=0.1)


@pytest.mark.parametrize("loaded", [True, False], ids=["model of the checkpoint", "model as the script makes it"])
@pytest.mark.parametrize(
    ("stop", "moment"), [(3, "in a window"), (4, "just before"), (5, "just after"), (7, "between"), (8, "at the end")]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    stop: int, moment: str, loaded: bool, whole: tuple[Path, Trainer, LAEPCallback], tmp_path: Path
) -> None:
    folder, first, finished = whole
    checkpoint = folder / f"checkpoint-{stop}"
    model = AutoModelForCausalLM.from_pretrained(checkpoint) if loaded else other_model()
    callback = two_prunings()
    trainer = trainer_of(tmp_path, callback, model=model)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    expected, found = first.model.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert logged(trainer, "loss") == logged(first, "loss")
    assert [without_clock(event) for event in callback.events] == [without_clock(e) for e in finished.events]
    mine, other = callback.pruner, finished.pruner
    assert mine is not None
    assert other is not None
    assert mine.num_tokens == other.num_tokens
    assert mine.plan == other.plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"model\.layers\.3\..*: found none, expected shape"),
        ({"vocab_size": 80}, r"checkpoint-6: .*: found shape \(64, 32\), expected shape \(80, 32\) as in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(
    changes: dict[str, int], message: str, whole: tuple[Path, Trainer, LAEPCallback], tmp_path: Path
) -> None:
    model = tiny_model("deepseek_v3", **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(tmp_path, two_prunings(), model=model)
    with pytest.raises(SecateurError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-6"))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_trainer_with_a_way_of_its_own_to_load_a_checkpoint_keeps_it(
    whole: tuple[Path, Trainer, LAEPCallback], tmp_path: Path
) -> None:
    seen: list[str] = []

    class Own(Trainer):
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            seen.append(resume_from_checkpoint)

    trainer = trainer_of(tmp_path, two_prunings(), of=Own)
    trainer._load_from_checkpoint(str(whole[0] / "checkpoint-3"))
    assert seen == [str(whole[0] / "checkpoint-3")]


def test_a_checkpoint_after_a_pruning_is_an_ordinary_one(whole: tuple[Path, Trainer, LAEPCallback]) -> None:
    folder, _, finished = whole
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    counts = state["stateful_callbacks"]["LAEPCallback"]["attributes"]["pruner_state"]["counts"]
    config = json.loads((folder / "checkpoint-6" / "config.json").read_text())
    assert counts == {str(layer): one.experts_after for layer, one in finished.events[0].layers.items()}
    assert config["moe_config"]["per_layer_experts_blocks"] == [0, *counts.values()]


def test_a_callback_that_comes_too_late_to_load_the_checkpoint_refuses_a_model_that_is_not_of_it(
    whole: tuple[Path, Trainer, LAEPCallback], tmp_path: Path
) -> None:
    # the Trainer loads the rest and only warns that the experts are missing
    trainer = trainer_of(tmp_path, model=tiny_model("deepseek_v3", seed=1))
    trainer.add_callback(two_prunings())
    with pytest.raises(SecateurError, match=r"expert tensors, e\.g\. .*load the model from the checkpoint itself"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-3"))


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(
    whole: tuple[Path, Trainer, LAEPCallback], tmp_path: Path
) -> None:
    checkpoint = whole[0] / "checkpoint-3"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(SecateurError, match="LAEP state is of a run with other settings"):
        trainer_of(tmp_path, laep(), model=model).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_a_run_without_laep_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(SecateurError, match="resumed at step 2 from a checkpoint that was written without"):
        trainer_of(tmp_path, laep(), model=model).train(resume_from_checkpoint=str(checkpoint))


REFUSED_SETTINGS: dict[str, Any] = {
    "torch_compile": True,
    "auto_find_batch_size": True,
    "restore_callback_states_from_checkpoint": True,
    "use_liger_kernel": True,
    "deepspeed": {"zero_optimization": {"stage": 0}},
}


def refused(trainer: Trainer, message: str) -> None:
    """Training is refused before its first step, and the model is as it was."""
    seen, model = Seen(trainer.model), trainer.model.train()
    before = everything(model)
    with pytest.raises(SecateurError, match=message):
        trainer.train()
    assert seen.batches == []
    after = everything(model)
    for mark in (":_is_accelerate_prepared", ":_is_torch_compile"):  # the Trainer's own
        after.pop(mark, None)
    assert after == before


@pytest.mark.parametrize("argument", REFUSED_SETTINGS)
def test_training_arguments_that_a_pruning_cannot_follow_are_refused_before_the_first_step(
    argument: str, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, laep())
    setattr(trainer.args, argument, REFUSED_SETTINGS[argument])
    before = everything(trainer.model)
    with pytest.raises(SecateurError, match=rf"TrainingArguments\.{argument} cannot be used with expert pruning: "):
        laep().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)
    with pytest.raises(SecateurError, match=argument):
        laep().check(trainer.model, torch.optim.AdamW(trainer.model.parameters()), trainer.args)
    assert everything(trainer.model) == before


def test_every_refused_argument_is_tried_and_exists() -> None:
    assert set(REFUSED_SETTINGS) == set(REFUSED_ARGUMENTS) <= set(TrainingArguments.__dataclass_fields__)


@pytest.mark.slow
def test_a_trainer_that_compiles_is_refused_before_the_first_step(tmp_path: Path) -> None:
    refused(trainer_of(tmp_path, laep(), torch_compile=True), "torch_compile cannot be used")


def test_an_optimizer_without_a_rule_is_refused_before_the_first_step(tmp_path: Path) -> None:
    refused(trainer_of(tmp_path, laep(), optim="adagrad"), r"torch\.optim\.adagrad\.Adagrad.*expected one of")


def test_a_goal_that_cannot_be_met_is_refused_before_the_first_step(tmp_path: Path) -> None:
    refused(trainer_of(tmp_path, laep(target_params=0.01)), "target_params is 0.01, but the smallest share")


def test_several_gpus_of_one_process_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, laep())
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
        with pytest.raises(SecateurError, match="2 GPUs of one process"):
            laep().check(trainer.model, torch.optim.AdamW(trainer.model.parameters()), trainer.args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prunings": [], "alpha": 0.5}, "not both"),
        ({"alpha": 0.5, "target_params": 0.5}, "expected exactly one of"),
        ({"target_params": 2.0}, "target_params"),
        ({"at_step": 0}, "at_step is 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        LAEPCallback(**settings)


def test_a_description_that_was_given_is_that_of_the_first_training_alone(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    schedule = [Pruning(rule=Rule(target_params=0.9), at_step=step) for step in (2, 5)]
    callback = laep(prunings=schedule, moe=describe_moe(model))
    trainer = trainer_of(tmp_path, callback, model=model, max_steps=3)
    trainer.train()
    (first,) = callback.events
    trainer.train()
    again, second = callback.events
    assert again == first
    one, other = first.plan.layers[0], second.plan.layers[0]
    assert other.experts_before == one.experts_after < one.experts_before
    assert len(trainer.model._forward_pre_hooks) == 0


def test_the_model_saved_by_the_trainer_loads_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, laep(), name="qwen3_moe")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    mine, other = trainer.model.state_dict(), again.state_dict()
    assert type(again) is type(trainer.model)
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []
