"""The torch type of an entry, by the safetensors format's name of it."""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def torch_dtypes(names: str) -> dict[str, torch.dtype]:
    """The torch types of these names, which spaces separate, in their order."""
    return {name: TORCH_DTYPES[name] for name in names.split()}
