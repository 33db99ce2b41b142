"""LAEP in TRL's trainers, which switch the balance loss of a MoE on by themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from secateur.families import describe_moe
from secateur.surgery.module import prune_model_
from secateur.train.load_callback import LoadCallback
from support.small_trainers import arguments, laep, losses, tokenizer, trainer_of
from support.tiny_models import random_plan, random_tokens, tiny_model

trl = pytest.importorskip("trl")

QUICK: dict[str, Any] = {"max_length": 16, "dataloader_pin_memory": False, "gradient_checkpointing": False}
TEXT = Dataset.from_dict(  # of different lengths
    {"text": [" ".join(map(str, row[: 3 + i % 6].tolist())) for i, row in enumerate(random_tokens(32, 8))]}
)


def sft(folder: Path, model: Any, *callbacks: Any, **settings: Any) -> Any:
    config = trl.SFTConfig(**arguments(folder, **QUICK | settings))
    return trl.SFTTrainer(
        model=model, args=config, train_dataset=TEXT, processing_class=tokenizer(), callbacks=list(callbacks)
    )


@pytest.mark.parametrize(
    "settings", [{"bf16": False}, {"loss_type": "nll", "bf16": False}, {"bf16": True}], ids=["chunked", "nll", "bf16"]
)
def test_sft_prunes_with_its_balance_loss_and_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = laep()
    trainer = sft(tmp_path, tiny_model("mixtral"), callback, **settings)
    trainer.train()
    (event,) = callback.events
    assert len({layer.experts_after for layer in event.layers.values()}) > 1
    found = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert len(found) == 4
    assert all(1.5 < value < 3 for value in found)  # 2 experts a token: balanced is 2
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=["padded", "packed", "padding-free", "checkpointed"],
)
def test_sft_counts_are_those_of_its_texts_to_the_token(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = LoadCallback(window_steps=1)
    trainer = sft(tmp_path, tiny_model("mixtral"), callback, max_steps=2, **settings)
    collate, seen = trainer.data_collator, []

    def counting(examples: Any) -> Any:
        seen.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    trainer.train()
    assert callback.pruner is not None
    assert callback.pruner.num_tokens == sum(seen[: 2 * trainer.args.gradient_accumulation_steps])


def test_rollouts_of_grpo_are_not_counted(tmp_path: Path) -> None:
    config = trl.GRPOConfig(
        **arguments(tmp_path, max_steps=2), num_generations=4, max_completion_length=5, beta=0.0, bf16=False
    )
    prompts = Dataset.from_dict({"prompt": [" ".join(map(str, row.tolist())) for row in random_tokens(8, 3)]})
    callback, lengths = LoadCallback(window_steps=1), []

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        lengths.extend(3 + len(ids) for ids in completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        model=tiny_model("mixtral"),
        reward_funcs=reward,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.pruner is not None
    assert callback.pruner.num_tokens == sum(lengths), "prompts and completions, once each"


def test_sft_trains_a_pruned_folder_whose_layers_differ(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    prune_model_(describe_moe(model), random_plan(describe_moe(model)))
    model.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    trainer = sft(tmp_path, again, max_steps=2)
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "aux_loss" in entry]) == 2


def test_dpo_prunes_model_and_reference_which_is_kept_in_step(tmp_path: Path) -> None:
    def words(*shape: int, seed: int) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in random_tokens(*shape, seed=seed)]

    pairs = Dataset.from_dict(
        {"prompt": words(16, 3, seed=1), "chosen": words(16, 4, seed=2), "rejected": words(16, 4, seed=3)}
    )
    model, reference = tiny_model("mixtral"), tiny_model("mixtral")
    in_step = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    callback = laep(copies=[reference], self_check=False)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**arguments(tmp_path, **QUICK, **in_step)),
        train_dataset=pairs,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert len(callback.events) == 1
    counts = describe_moe(model).counts
    assert describe_moe(reference).counts == counts != dict.fromkeys(counts, 8)
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize("uniform", [False, True])
def test_a_trainer_with_router_logits_trains_before_and_after_a_pruning(uniform: bool, tmp_path: Path) -> None:
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    callback = laep(uniform=uniform, at_step=2)
    trainer = trainer_of(tmp_path, callback, model=model)
    trainer.train()
    assert len(callback.events) == 1
    plain = model(input_ids=random_tokens(2, 8), labels=random_tokens(2, 8), output_router_logits=False).loss
    output = model(input_ids=random_tokens(2, 8), labels=random_tokens(2, 8))
    torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss)
