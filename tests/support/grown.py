"""What a grown folder holds and computes, by stock transformers and by safetensors' own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.upcycling.checks import check_upcycled

TOKENS = torch.arange(3, 60)[None]
NEAR = {"rtol": 0, "atol": 2e-5}  # norms and softmax of transformers compute in float32 in any case


def model_in(folder: Path) -> Any:
    """The model of stock transformers, in float64; every tensor found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a model, or of that in a folder."""
    found: Tensor = (model_in(model) if isinstance(model, Path) else model)(TOKENS, use_cache=False).logits
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def change_routers(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Write the routers of a folder anew."""
    found = tensors(folder)
    for name in found:
        if name.endswith(("moe.gate.weight", "mlp.gate.weight")):
            found[name] = change(found[name])
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def always(model: Any, experts: list[int], weight: float | None = None) -> None:
    """Make every token take these experts, at the router's weights or at this one."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        index = torch.tensor([experts]).expand(len(output[2]), -1)
        weights = output[1] if weight is None else torch.full_like(index, weight, dtype=output[1].dtype)
        return output[0], weights, index

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(hook)


def faults(parents: list[Path], out: Path) -> list[str]:
    """The claims of `verify` that fail."""
    return [check.claim for check in check_upcycled(parents, out) if not check.passed]
