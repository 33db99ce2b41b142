"""The tensors of a changed checkpoint in pieces of bounded size, each made from the source when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.expert_axis import gather, row_index
from secateur.training_checkpoint.changes import Change
from secateur.training_checkpoint.rows import read_rows
from secateur.training_checkpoint.stored import StoredCheckpoint, StoredTensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `first` to `first + rows` of axis 0 of a new tensor; a tensor without axes is one row."""

    name: str
    shape: tuple[int, ...]
    first: int
    rows: int
    dtype: torch.dtype

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.first, *(0 for _ in self.shape[1:])) if self.shape else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1:]) if self.shape else ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def new_shape(tensor: StoredTensor, changes: Mapping[str, Change]) -> tuple[int, ...]:
    change = changes.get(tensor.name)
    return change.new_shape(tensor) if change else tensor.shape


def bytes_after(stored: StoredCheckpoint, changes: Mapping[str, Change]) -> int:
    """Bytes of all entries after the changes."""
    tensors = stored.tensors.values()
    less = sum(t.num_bytes - math.prod(new_shape(t, changes)) * t.dtype.itemsize for t in tensors)
    return stored.num_bytes - less


def pieces(tensor: StoredTensor, shape: tuple[int, ...], limit: int) -> Iterator[Piece]:
    """A tensor of the new shape, cut along axis 0 into pieces of at most `limit` bytes, one row at least."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * tensor.dtype.itemsize
    step = max(1, limit // max(1, row_bytes))
    for first in range(0, max(rows, 1), step):
        yield Piece(
            name=tensor.name, shape=shape, first=first, rows=max(0, min(step, rows - first)), dtype=tensor.dtype
        )


def files(parts: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces together as long as they are at most `limit` bytes.

    Never two of one tensor: of neighbours, the first had no room for another row.
    """
    group: list[Piece] = []
    size = 0
    for piece in parts:
        if group and size + piece.num_bytes > limit:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.num_bytes
    if group:
        yield group


def new_rows(tensor: StoredTensor, change: Change | None, piece: Piece) -> Tensor:
    """The entries of a piece: the source's, gathered by the change."""
    rows = range(piece.first, piece.first + piece.rows)
    if change is None:
        return read_rows(tensor, rows)
    if change.to_zero:
        return torch.zeros(piece.sizes, dtype=piece.dtype)
    spec, layer_plan = change.spec, change.layer_plan
    if spec.axis.dim == 0:
        old = row_index(layer_plan, spec).tolist()
        return read_rows(tensor, old[rows.start : rows.stop])
    return gather(read_rows(tensor, rows), spec, layer_plan)
