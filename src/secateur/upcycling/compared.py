"""Is a stored tensor the bytes of others, or what a number rounds to?"""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.model_folder.read.tensor_files import TensorFiles

NEAR = 0.5 * (1 + 1e-3)  # units in the last place; doubles become bfloat16 by way of float32


def read_tensor(files: TensorFiles, name: str) -> Tensor:
    """A tensor by safetensors' own reader."""
    with safe_open(files.path / files.tensors[name].file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(name)
        return found


def is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bytes."""
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    )


def ulp(values: Tensor) -> Tensor:
    """The distance of each entry to the next larger one in size, of its own type."""
    if not values.numel():
        return torch.zeros(1, dtype=torch.float64)
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp_min(float(info.tiny))).exponent - 1
    return torch.ldexp(torch.full_like(values, float(info.eps), dtype=torch.float64), exponent)


def unlike(ours: Tensor, wanted: Tensor) -> str:
    """Why a stored tensor is not what rounds to it; "" where it is."""
    if ours.shape != wanted.shape:
        return f"has shape {list(ours.shape)}, expected {list(wanted.shape)}"
    if not ours.numel():
        return ""
    off = ((ours.double() - wanted).abs() / ulp(ours)).max()
    return "" if float(off) <= NEAR else f"is off by {float(off):.3g} units in the last place"
