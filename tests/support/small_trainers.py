"""Small runs of other people's trainers on one tiny model, for the tests of LAEP inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from secateur.train.callback import LAEPCallback
from support.tiny_models import VOCABULARY, random_tokens, tiny_model


def rows(count: int = 32, length: int = 8) -> list[dict[str, Tensor]]:
    """Token rows with labels, as a causal LM is trained on."""
    return [{"input_ids": row, "labels": row} for row in random_tokens(count, length)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are the ids themselves, 0 pads."""
    words = {str(number): number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="0", unk_token="0")


def laep(**settings: Any) -> LAEPCallback:
    """A pruning after the second step to layers that differ."""
    return LAEPCallback(**{"at_step": 2, "alpha": 0.9, "window_steps": 2, **settings})


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """Of TrainingArguments and its kin."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **settings,
    }


def trainer_of(folder: Path, *callbacks: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    """transformers' own."""
    return Trainer(
        model=tiny_model("mixtral") if model is None else model,
        args=TrainingArguments(**arguments(folder, **settings)),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> list[float]:
    """Logged at every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def wrap_in_checkpoints(model: Any, place: str) -> None:
    """torch's wrapper of activation checkpointing around each layer ("layers"), its "mlp", or the "experts" in it."""
    for index, layer in enumerate(model.model.layers):
        if place == "layers":
            model.model.layers[index] = checkpoint_wrapper(layer)
        elif place == "mlp":
            layer.mlp = checkpoint_wrapper(layer.mlp)
        else:
            layer.mlp.experts = checkpoint_wrapper(layer.mlp.experts)
