"""Recordings of SGLang's expert distribution recorder as statistics: how many tokens each expert got while serving.

SGLang (0.5, srt/eplb/expert_distribution.py, modes `stat` and `stat_approx`) writes with torch.save a dictionary whose
`logical_count` has shape (steps, layers, experts), with a row for every decoder layer; rows of layers without experts
are 0. A table (layers, experts), as `--init-expert-location` takes it, is accepted as well, and one with rows for the
MoE layers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.archive import load_plain
from secateur.files.digest import sha256_of
from secateur.files.limits import MAX_COUNT
from secateur.files.opened import opened
from secateur.stats import LayerStats, RouterStats

KEY = "logical_count"
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def read_recording(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """(logical_count summed over steps: (layers, experts) int64, what to say of the file as JSON).

    Nothing but tensors and plain values is read from the file: it is pickled, and code in it is not run.

    Raises:
        SecateurError: no such file, not a recording, or counts that are not whole numbers of 0 or more.
    """
    with opened(path, where=f"recording {path}") as file:
        content = load_plain(file, f"recording {path}")
    if isinstance(content, dict) and "records" in content:
        raise SecateurError(
            f"recording {path}: written by the mode per_pass or per_token; expected one of the mode stat or stat_approx"
        )
    count = content.get(KEY) if isinstance(content, dict) else None
    if type(count) is not Tensor or not _is_plain(count) or count.ndim not in (2, 3) or not count.numel():
        raise SecateurError(
            f"recording {path}: {KEY} is {_described(count)}, expected whole numbers of shape (steps, layers, experts)"
        )
    if bool((count < 0).any()):
        raise SecateurError(f"recording {path}: {KEY} has negative counts, such as {int(count.min())}")
    if float(count.double().sum()) >= MAX_COUNT:
        raise SecateurError(f"recording {path}: {KEY} counts more than {MAX_COUNT} tokens")
    steps = count.shape[0] if count.ndim == 3 else 1
    about = {"format": "sglang", "digest": sha256_of(path), "steps": steps}
    return count.reshape(-1, *count.shape[-2:]).sum(dim=0), about


def _is_plain(tensor: Tensor) -> bool:
    """Whether whole numbers lie in memory one by one: it is not quantised, sparse, or one that is repeated."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    return is_dense and tensor.dtype in WHOLE and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = "of several shapes" if value.is_nested else tuple(value.shape)
    form = "" if value.layout is torch.strided and value.device.type == "cpu" else f" {value.layout} {value.device}"
    return f"{value.dtype} {shape}{form}"


def stats_of_recording(
    recorded: Tensor, counts: Mapping[int, int], *, num_layers: int, top_k: int, where: str
) -> RouterStats:
    """Statistics of the MoE layers.

    The number of tokens is not recorded; it is taken to be the counts of a layer by `top_k`.

    Args:
        recorded: (layers, experts). counts: experts of every MoE layer. num_layers: decoder layers. where: its name
            in messages.

    Raises:
        SecateurError: rows or experts that do not fit the model, counts where a layer has no experts, or none where it
            has.
    """
    rows, experts = recorded.shape
    layers = list(range(num_layers)) if rows == num_layers else sorted(counts)
    if rows != len(layers):
        raise SecateurError(
            f"{where}: {rows} layers, but the model has {num_layers} decoder layers, {len(counts)} with experts"
        )
    found = {}
    for layer, row in zip(layers, recorded, strict=True):
        total = int(row.sum())
        if layer not in counts:
            if total:
                raise SecateurError(f"{where}: {total} tokens for experts of layer {layer}, which has none")
            continue
        if counts[layer] != experts:
            raise SecateurError(f"{where}: {experts} experts a layer, but layer {layer} has {counts[layer]}")
        if not total:
            raise SecateurError(f"{where}: no token for layer {layer}, which has experts")
        found[layer] = LayerStats(num_tokens=max(1, total // top_k), token_count=row)
    return RouterStats(layers=found)
