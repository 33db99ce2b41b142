"""Tiny V-MoE models, one of each kind. A new kind is one row of KINDS and runs through every test on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from secateur.models.vmoe import VMoEConfig, VMoEForImageClassification

COMMON: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "moe_layers": [0, 2],
    "num_experts": 8,
    "num_labels": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "token choice": {"eval_capacity_factor": None},
    "few places": {"eval_capacity_factor": 0.5, "batch_priority": "max", "group_images": 2, "norm_topk_prob": True},
    "expert choice": {"router_type": "expert_choice", "eval_capacity_factor": 1.0, "classifier": "gap"},
    "over tokens": {
        "router_type": "expert_choice",
        "expert_choice_gates": "tokens",
        "expert_capacity": 3,
        "group_images": 1,
    },
    "ensemble": {"ensemble_size": 2, "group_images": None, "representation_size": 16},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny_vmoe(kind: str, *, seed: int = 0, **changes: Any) -> VMoEForImageClassification:
    """A model of a row with random weights, large enough for tokens to differ, in evaluation mode."""
    torch.manual_seed(seed)
    config = VMoEConfig(**COMMON | {"initializer_range": 0.2} | KINDS[kind] | changes)
    return VMoEForImageClassification(config).eval()


def random_images(number: int, *, seed: int = 0) -> Tensor:
    """(number, 3, 8, 8)."""
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def saved(kind: str, folder: Path) -> VMoEForImageClassification:
    model = tiny_vmoe(kind)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def loaded(folder: Path) -> Any:
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        for tensor in model.parameters():  # they lie anywhere in a mapped file, and matrix products round by alignment
            tensor.data = tensor.data.clone()
    return model
