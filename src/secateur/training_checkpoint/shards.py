"""transformers' distributed save of a model: safetensors files, one a rank, each with its blocks of the tensors.

The offsets of a block in its tensor are in the header of its file, under DCP_SHARDING_INFO.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from secateur.errors import SecateurError
from secateur.files.dtypes import TORCH_DTYPES
from secateur.files.json import parse_json
from secateur.files.records import Count, as_record
from secateur.files.safetensors_header import read_header
from secateur.training_checkpoint.stored import (
    Chunk,
    StoredBytes,
    StoredCheckpoint,
    StoredTensor,
    file_inside,
    whole_tensor,
)

FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

OFFSETS = "DCP_SHARDING_INFO"  # text in a header: {tensor: {"saved_offsets": [...]}}


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Where a block of a tensor begins, on each axis."""

    saved_offsets: tuple[Count, ...]


def is_shards_folder(folder: Path) -> bool:
    return any(FILE.fullmatch(path.name) for path in folder.iterdir())


def read_shards(folder: Path) -> StoredCheckpoint:
    """What the shard files of a folder hold.

    Raises:
        SecateurError: a file is truncated or is no such file, or the blocks of a tensor are not all of it.
    """
    names = sorted(path.name for path in folder.iterdir() if FILE.fullmatch(path.name))
    _check_ranks(folder, names)
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for name in names:
        path = file_inside(folder, name)
        try:
            for tensor, dtype, chunk in _chunks(path):
                chunks.setdefault(tensor, []).append(chunk)
                dtypes.setdefault(tensor, set()).add(dtype)
        except (SecateurError, KeyError) as error:
            raise SecateurError(f"{path}: not a distributed safetensors file ({error})") from error
    headers = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    try:
        tensors = _joined(chunks, dtypes)
    except SecateurError as error:
        raise SecateurError(f"{folder / headers}: {error}") from error
    return StoredCheckpoint(tensors=tensors, files=frozenset(names), described_in=headers)


def _joined(
    chunks: Mapping[str, Sequence[Chunk]], dtypes: Mapping[str, Collection[torch.dtype]]
) -> dict[str, StoredTensor]:
    tensors = {}
    for tensor, parts in chunks.items():
        if len(dtypes[tensor]) != 1 or len({len(part.sizes) for part in parts}) != 1:
            raise SecateurError(f"the blocks of {tensor} have different dtypes or numbers of axes")
        ends = [[o + n for o, n in zip(part.offsets, part.sizes, strict=True)] for part in parts]
        shape = tuple(map(max, zip(*ends, strict=True)))
        filled = [part for part in parts if 0 not in part.sizes]
        tensors[tensor] = whole_tensor(tensor, next(iter(dtypes[tensor])), shape, filled)
    if not tensors:
        raise SecateurError("there is no tensor")
    return tensors


def _check_ranks(folder: Path, names: list[str]) -> None:
    """No file says how many ranks there were, nor how long a whole tensor is: a gap in the numbers is all there is."""
    ranks = sorted({int(name.split("-")[1]) for name in names})
    if ranks != list(range(1, len(ranks) + 1)):
        raise SecateurError(f"{folder}: it has the shards of ranks {ranks}, expected all from 1 on")


def _chunks(path: Path) -> list[tuple[str, torch.dtype, Chunk]]:
    header = read_header(path)
    about = parse_json(header.metadata[OFFSETS], OFFSETS)
    blocks = as_record(about, dict[str, Block], OFFSETS)
    found = []
    for name, entry in header.entries.items():
        at = blocks[name].saved_offsets
        if len(at) != len(entry.shape):
            raise SecateurError(f"{name}: offsets {at} for a block of shape {entry.shape}")
        place = StoredBytes(path=path, start=entry.start, length=entry.length)
        found.append(
            (name, TORCH_DTYPES[entry.dtype], Chunk(offsets=at, sizes=entry.shape, place=place, is_archive=False))
        )
    return found
