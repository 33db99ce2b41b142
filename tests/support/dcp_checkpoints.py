"""Small training checkpoints, written by torch's own writers, as the engines write them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from secateur.plans import LayerPlan, Plan
from support.tiny_models import random_tokens, tiny_model

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NUM_EXPERTS = 8
# Layer 1 keeps all; layer 0 loses some and the rest change places; layer 2 only loses some.
PLAN = Plan(
    layers={
        0: LayerPlan(experts_before=NUM_EXPERTS, order=(6, 1, 3)),
        2: LayerPlan(experts_before=NUM_EXPERTS, order=(0, 2, 4, 5, 7)),
    },
    criterion="test",
)
PERMUTATION = Plan(
    layers={layer: LayerPlan(experts_before=NUM_EXPERTS, order=(5, 2, 7, 0, 1, 6, 4, 3)) for layer in range(3)},
    criterion="test",
)


def save(state_dict: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state_dict, checkpoint_id=folder, no_dist=True)
    return folder


def save_shards(model: PreTrainedModel, folder: Path) -> Path:
    """What save_pretrained(distributed_checkpoint=True) writes for one rank; it refuses a model that is not sharded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(get_model_state_dict(model), storage_writer=writer, no_dist=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def load(state_dict: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state_dict, checkpoint_id=folder, no_dist=True)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by torch."""
    about = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.empty(a.size, dtype=a.properties.dtype) for name, a in about.items() if hasattr(a, "size")}
    load(found, folder)
    return found


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = random_tokens(2, 12, seed=seed)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained() -> tuple[PreTrainedModel, torch.optim.AdamW]:
    """A tiny Qwen3-MoE and its optimizer after two steps."""
    model = tiny_model("qwen3_moe")
    optimizer = adamw(model)
    for seed in range(2):
        step(model, optimizer, seed)
    return model, optimizer


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {**get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT)}


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint that `training_state` was saved to, into a model of the right shapes."""
    state = training_state(model, optimizer)
    load(state, folder)
    set_optimizer_state_dict(model, optimizer, state.pop("optimizer"), options=FLAT)
    set_model_state_dict(model, state)
