"""Write checkpoints in the layout of the V-MoE authors' code, as that code would: names, tree order, slices, files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"


def packed(value: Any) -> bytes:
    found: bytes = msgpack.packb(value, use_bin_type=True)
    return found


def array(value: Tensor) -> msgpack.ExtType:
    data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, packed((list(value.shape), str(value.dtype).removeprefix("torch."), data)))


def slices(box: list[tuple[int, ...]]) -> bytes:
    """(start, stop), or (start, stop, step), of every axis."""
    return packed([packed((*edge, None)[:3]) for edge in box])


def halves(value: Tensor) -> list[list[tuple[int, ...]]]:
    """The slices of an array that is cut in two along its first axis, if it can be."""
    whole = [(0, size) for size in value.shape]
    if not whole or whole[0][1] < 2:
        return [whole]
    middle = whole[0][1] // 2
    return [[(0, middle), *whole[1:]], [(middle, whole[0][1]), *whole[1:]]]


def info(value: Tensor, boxes: list[list[tuple[int, ...]]], where: list[int], **changes: Any) -> msgpack.ExtType:
    dtype = str(value.dtype).removeprefix("torch.")
    shape = packed((changes.get("shape", list(value.shape)), changes.get("dtype", dtype), False, {}))
    return msgpack.ExtType(8, packed((shape, [slices(box) for box in boxes], changes.get("files", where))))


def write(prefix: Path, arrays: Mapping[str, Tensor], *, num_files: int = 2, piece: int = 50, **changes: Any) -> Path:
    """Names are paths (`params/head/bias`). piece: entries of a piece of a chunk. changes: of the index, for damage."""
    leaves = sorted(arrays, key=lambda name: name.split("/"))
    data: list[dict[str, Any]] = [{CHUNKS_KEY: True} for _ in range(num_files)]
    tree: dict[str, Any] = {}
    for number, name in reversed(list(enumerate(leaves))):  # numbers go by the sorted names, whatever the order
        value = arrays[name]
        boxes = halves(value)
        files = [(number + turn) % num_files for turn in range(len(boxes))]
        for box, file in zip(boxes, files, strict=True):
            flat = value[tuple(slice(*edge) for edge in box)].flatten()
            pieces = [array(flat[start : start + piece]) for start in range(0, len(flat), piece)]
            data[file].setdefault(str(number), []).append([pieces, msgpack.ExtType(6, slices(box))])
        *parents, key = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = info(value, boxes, files, **changes.get("info", {}))
    index = {"shard_count": num_files, "index": tree, "version": "20220622"} | changes.get("index", {})
    prefix.with_name(f"{prefix.name}.index").write_bytes(packed(index))
    for file, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{file:05d}-of-{num_files:05d}").write_bytes(packed(content))
    return prefix


def random_arrays(*, members: int = 1, token: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of a V-MoE with the flax names and axes.

    Two blocks of width 8 with 2 heads, the second with 4 experts of width 12; images of 4 x 4 x 3 in patches of 2 x 2;
    5 classes.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (2, 2, 3, 8),
        "embedding/bias": (8,),
        "Encoder/posembed_input/pos_embedding": (1, 4 + token, 8),
        "Encoder/encoder_norm/scale": (8,),
        "Encoder/encoder_norm/bias": (8,),
        "pre_logits/kernel": (8, 6),
        "pre_logits/bias": (6,),
        "head/kernel": (6, 5),
        "head/bias": (5,),
    }
    shapes |= {"cls": (1, 1, 8)} if token else {}
    for block in (0, 1):
        before = f"Encoder/encoderblock_{block}/"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{before}{norm}/scale": (8,), f"{before}{norm}/bias": (8,)}
        for part in ("query", "key", "value"):
            shapes |= {f"{before}SelfAttention/{part}/kernel": (8, 2, 4), f"{before}SelfAttention/{part}/bias": (2, 4)}
        shapes |= {f"{before}SelfAttention/out/kernel": (2, 4, 8), f"{before}SelfAttention/out/bias": (8,)}
        mlp, experts = (f"{before}Moe/Mlp/", (4,)) if block else (f"{before}Mlp/", ())
        shapes |= {f"{mlp}Dense_0/kernel": (*experts, 8, 12), f"{mlp}Dense_0/bias": (*experts, 12)}
        shapes |= {f"{mlp}Dense_1/kernel": (*experts, 12, 8), f"{mlp}Dense_1/bias": (*experts, 8)}
    shapes["Encoder/encoderblock_1/Moe/Router/dense/kernel"] = (8, 4) if members == 1 else (8, members, 4 // members)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def params(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In a tree as the trainer saves it, beside a value of the optimizer."""
    return {f"params/{name}": value for name, value in arrays.items()} | {"opt_state/mu/head/bias": torch.zeros(5)}
