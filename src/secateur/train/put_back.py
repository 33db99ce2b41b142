"""Put a Trainer's checkpoint into the live model, experts and all, also one from before a pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from secateur.errors import SecateurError
from secateur.expert_axis import is_sharded
from secateur.families import CHECKPOINTED, MoEModel, describe_moe, native_class, without_adapters
from secateur.files.json import read_object
from secateur.modeling_secateur import pruned_model_class
from secateur.surgery.config_json import is_pruned
from secateur.surgery.module import set_counts_, take_value_
from secateur.train.laep import LAEP
from secateur.train.resumed import STATE


def load_best_(pruner: LAEP, checkpoint: Path, callback: str) -> str:
    """Give the model the weights and the shape that it had at a checkpoint, and LAEP what it knew then.

    The model object and its parameters stay. The optimizer forgets its state of tensors that change their shape.

    Args:
        checkpoint: of this run, whole weights. callback: the name under which it has the state of LAEP.

    Returns:
        A line for people.

    Raises:
        SecateurError: the state of LAEP does not fit the weights.
    """
    before = sum(pruner.moe.counts.values())
    for mine in put_into_(pruner.moe, checkpoint):
        for optimizer in pruner.optimizers:
            optimizer.state.pop(mine, None)
    steps = pruner.num_steps
    pruner.go_back(read_object(checkpoint / STATE)["stateful_callbacks"][callback]["attributes"]["pruner_state"])
    line = f"the best checkpoint is {checkpoint.name}, at step {pruner.num_steps} of {steps}: the model is that again"
    after = sum(pruner.moe.counts.values())
    return line if after == before else f"{line}, with {after} experts instead of {before}"


def put_into_(moe: MoEModel, checkpoint: Path) -> list[Tensor]:
    """Give a model the weights and the shape of a checkpoint of its family, in place; `moe` describes it no longer.

    Returns:
        The parameters and buffers whose shape has changed; all are the objects that they were.

    Raises:
        SecateurError: the checkpoint is of a model that differs in more than how many experts it has; nothing was
            changed.
    """
    model = moe.model
    loaded = _load(model, checkpoint)
    theirs = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    mine = {
        name.replace(f"{CHECKPOINTED}.", ""): tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name in {**mine, **theirs}:
        one, other = (None if held is None else tuple(held.shape) for held in (mine.get(name), theirs.get(name)))
        if one != other and (None in (one, other) or name not in moe.layout.tensors):
            found, expected = ("none" if shape is None else f"shape {shape}" for shape in (other, one))
            raise SecateurError(f"{checkpoint}: {name}: found {found}, expected {expected} as in the model")
    counts = describe_moe(loaded, moe.layout).counts
    changed: list[Tensor] = []
    with torch.no_grad():
        for name, tensor in mine.items():
            value = theirs[name].to(tensor.device, tensor.dtype)
            if tensor.shape == value.shape:
                tensor.copy_(value)
                continue
            take_value_(tensor, value)
            changed.append(tensor)
    if counts != moe.counts:
        set_counts_(moe, counts)
    return changed


def resume_into_shape(trainer: Trainer) -> None:
    """Let a Trainer resume a checkpoint of other expert counts than its model has, in place.

    Its own way reads the file as the model's state dict: experts of another number do not fit, and of families that
    are stored expert by expert nothing is found. Sharded models and those with adapters, and Trainers that have a way
    of their own, keep it.
    """
    way = type(trainer)._load_from_checkpoint
    if way is not Trainer._load_from_checkpoint:
        return

    def load(resume_from_checkpoint: str, model: Any = None) -> None:
        held: Any = trainer.model if model is None else model
        inner, folder = without_adapters(held), Path(resume_from_checkpoint)
        if inner is held and has_whole_weights(held) and (folder / "config.json").is_file():
            put_into_(describe_moe(held), folder)
        else:
            way(trainer, resume_from_checkpoint, model)

    vars(trainer)["_load_from_checkpoint"] = load


def _load(model: Any, checkpoint: Path) -> Any:
    native = native_class(model)
    made: Any = pruned_model_class(native) if is_pruned(read_object(checkpoint / "config.json")) else native
    config = made.config_class.from_pretrained(checkpoint)
    return made.from_pretrained(checkpoint, config=config, dtype=model.dtype)


def has_whole_weights(model: nn.Module) -> bool:
    """Whether a checkpoint of this model can be put back: no shards, no adapter over weights that it leaves out."""
    return not any(is_sharded(parameter) for parameter in model.parameters()) and not hasattr(model, "peft_config")
