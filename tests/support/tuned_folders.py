"""Fine-tuned folders and LoRA adapters, for router change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from secateur.families import describe_moe
from support.tiny_models import tiny_model

RANK, ALPHA = 2, 6


def routers(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """{layer: the parameter with a row for each expert}."""
    moe, parameters = describe_moe(model), dict(model.named_parameters())
    return {
        layer: parameters[spec.name]
        for layer, block in moe.blocks.items()
        for spec in block.tensors
        if ".experts." not in spec.name
        and spec.name in parameters
        and parameters[spec.name].numel() > 2 * block.num_experts
    }


def finetuned(name: str, seed: int = 7) -> PreTrainedModel:
    """The tiny model of that row with other routers."""
    model, draw = tiny_model(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers(model).values():
            router += 0.1 * torch.randn(router.shape, generator=draw, dtype=router.dtype)
    return model


def write_adapter(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora_of(model: PreTrainedModel) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """(an adapter's tensors for all routers, the model with them merged)."""
    draw, tensors = torch.Generator().manual_seed(5), {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for router in routers(model).values():
            a, b = (torch.randn(*shape, generator=draw) for shape in ((RANK, router.shape[1]), (len(router), RANK)))
            stem = "base_model.model." + names[id(router)].removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            router += ALPHA / RANK * (b @ a)
    return tensors, model
