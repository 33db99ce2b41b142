"""Which models LAEP takes: through PEFT's wrapper, with a head or none; what would not load again is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
)

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.train.laep import LAEP
from support.small_trainers import laep, losses, same_weights, trainer_of
from support.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(4, 8)


def with_lora(**settings: Any) -> Any:
    return get_peft_model(tiny_model("mixtral"), LoraConfig(r=2, **settings))


def test_adapters_on_attention_train_through_a_pruning_in_a_trainer(tmp_path: Path) -> None:
    model = with_lora(target_modules=["q_proj", "v_proj"])
    callback = laep()
    trainer = trainer_of(tmp_path, callback, model=model)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    (event,) = callback.events
    assert event.oracle_max_abs_difference == 0.0
    assert event.tokens == 2 * 4 * 8
    inner = model.get_base_model()
    counts = describe_moe(inner).counts
    assert type(inner).__name__ == "PrunedMixtralForCausalLM"
    assert set(counts.values()) != {8}
    moved = [name for name, value in model.named_parameters() if value.requires_grad and (value != before[name]).any()]
    assert len(moved) == len(before)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(type(inner).from_pretrained(tmp_path / "merged"), merged)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"model\.layers\.0\.mlp\.experts has adapters"),
        ({"target_parameters": ["mlp.gate.weight"]}, r"model\.layers\.0\.mlp\.gate has adapters"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
            r"model\.layers\.0\.mlp\.gate has adapters \(ModulesToSaveWrapper of PEFT\)",
        ),
    ],
)
def test_adapters_on_experts_or_routers_are_refused_at_the_start_by_name(settings: Any, name: str) -> None:
    model = with_lora(**{"target_modules": [], **settings})
    with pytest.raises(SecateurError, match=name):
        LAEP(model, torch.optim.AdamW(model.parameters()))


def prunes(model: Any, **batch: Any) -> LAEP:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = LAEP(model, optimizer, at_step=2, alpha=0.9, window_steps=2)
    for _ in range(3):
        output = model(input_ids=TOKENS, **batch)
        (output.loss if batch else output.last_hidden_state.square().mean()).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    (event,) = pruner.events
    assert event.oracle_max_abs_difference == 0.0
    assert len(set(pruner.moe.counts.values())) > 1
    return pruner


def test_a_base_model_without_a_head_is_pruned_and_loads(tmp_path: Path) -> None:
    model = MixtralModel(tiny_model("mixtral").config)
    prunes(model)
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModel.from_pretrained(tmp_path), model)


def test_a_sequence_classifier_is_pruned_and_loads(tmp_path: Path) -> None:
    model = MixtralForSequenceClassification(tiny_model("mixtral").config)
    prunes(model, labels=torch.tensor([0, 1, 0, 1]))
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)


class OfAUser(MixtralForCausalLM):
    """A class that no auto class knows."""


def test_a_class_that_no_auto_class_knows_is_refused_at_the_start() -> None:
    model = OfAUser(tiny_model("mixtral").config)
    with pytest.raises(SecateurError, match=r"OfAUser, which transformers' auto classes do not know: once pruned it"):
        LAEP(model, torch.optim.AdamW(model.parameters()))
