"""What a checkpoint folder holds, by name and place, whatever format it is in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """`length` bytes of a file, from `start`."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One block of a tensor: where it lies in the tensor, and its bytes.

    is_archive: the bytes are a file of `torch.save`, not the bare entries one after another.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: StoredBytes
    is_archive: bool


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor and the chunks that together are all of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    requires_grad: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A folder's tensors and opaque entries, by their full names.

    paths: entry name -> its path in the nested state dict that was saved; None where the format keeps none.
    files: the files that hold all this and its description, relative to the folder. described_in: the one of them, or
    the words for those, that names and shapes are from.
    """

    tensors: Mapping[str, StoredTensor]
    blobs: Mapping[str, StoredBytes] = field(default_factory=dict)
    paths: Mapping[str, tuple[Any, ...]] | None = None
    files: frozenset[str]
    described_in: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values()) + sum(b.length for b in self.blobs.values())


def file_inside(folder: Path, relative: object) -> Path:
    """The regular file at `relative` in `folder`.

    Raises:
        SecateurError: it is no relative path, leads out of the folder (by `..` or a link), or no such file is there.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise SecateurError(f"{folder}: it names a file {relative!r:.100}, expected a relative path")
    try:
        path = (folder / relative).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise SecateurError(f"{folder}: the file {relative!r:.100} cannot be found ({error})") from error
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not inside:
        raise SecateurError(f"{folder}: it names the file {relative!r:.100}, expected one inside it, without '..'")
    if not path.is_file():
        raise SecateurError(f"{folder}: the file {relative!r:.100} is missing")
    return path


def bytes_of(path: Path, start: object, length: object, what: str) -> StoredBytes:
    """The place of `what`, checked against the size of the file.

    Raises:
        SecateurError: it does not lie inside the file: the file is truncated, or what describes it is wrong.
    """
    size = path.stat().st_size
    if type(start) is not int or type(length) is not int or start < 0 or length < 0 or start + length > size:
        raise SecateurError(
            f"{path}: {what} is at bytes {start!r} + {length!r}, but the file has {size}; it is truncated or damaged"
        )
    return StoredBytes(path=path, start=start, length=length)


def whole_tensor(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: list[Chunk], requires_grad: bool = False
) -> StoredTensor:
    """A tensor of these chunks.

    Raises:
        SecateurError: the chunks are not all of the tensor, or reach out of it.
    """
    for chunk in chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) or any(map(int.__gt__, ends, shape)):
            raise SecateurError(
                f"{name}: a chunk at {chunk.offsets} of size {chunk.sizes} is not inside its shape {shape}"
            )
    found = sum(math.prod(chunk.sizes) for chunk in chunks)
    if found != math.prod(shape):
        raise SecateurError(
            f"{name}: {len(chunks)} chunks hold {found} entries, expected each of its {math.prod(shape)} once"
        )
    if not _are_apart(chunks):
        raise SecateurError(f"{name}: its chunks overlap, expected each entry once")
    return StoredTensor(name=name, dtype=dtype, shape=shape, chunks=tuple(chunks), requires_grad=requires_grad)


def _are_apart(chunks: list[Chunk]) -> bool:
    """True when no two chunks share an entry."""
    boxes = [tuple(zip(chunk.offsets, map(int.__add__, chunk.offsets, chunk.sizes), strict=True)) for chunk in chunks]
    by_axis = [set(spans) for spans in zip(*boxes, strict=True)]
    if all(_follow_each_other(spans) for spans in by_axis):  # a grid, as every sharding of torch's own makes it
        return len(set(boxes)) == len(boxes)
    return not any(
        all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))
        for one, other in itertools.combinations(boxes, 2)
    )


def _follow_each_other(spans: set[tuple[int, int]]) -> bool:
    return all(left[1] <= right[0] for left, right in itertools.pairwise(sorted(spans)))
