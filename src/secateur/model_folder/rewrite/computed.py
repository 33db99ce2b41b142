"""Pieces computed from stored tensors while they are written: a mean, a part of a matrix, several side by side.

The arithmetic is float64 and rounds once, to the type that is stored. Memory: one buffer a source; one
matrix for a part whose rows are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError
from secateur.files.safetensors_header import BITS
from secateur.model_folder.rewrite.pieces import Copy

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = 2**20  # computed at once
Read = Callable[[Copy], bytes]  # all bytes of a copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean of tensors of one shape, entry by entry, in the order of `sources`."""

    sources: tuple[Copy, ...]
    dtype: str

    @property
    def length(self) -> int:
        return self.sources[0].length

    def chunks(self, read: Read) -> Iterator[bytes]:
        """Its bytes, in order."""
        size = BITS[self.dtype] // 8
        for at in range(0, self.length, ENTRIES * size):
            count = min(ENTRIES * size, self.length - at)
            total = None
            for one in self.sources:
                piece = Copy(file=one.file, start=one.start + at, length=count)
                values = as_tensor(read(piece), self.dtype).double()
                total = values if total is None else total.add_(values)
            assert total is not None
            yield as_bytes(total / len(self.sources), self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Matrices of as many rows and as wide ones, side by side: their bytes row by row."""

    sources: tuple[Copy, ...]
    rows: int
    row_bytes: int

    @property
    def length(self) -> int:
        return len(self.sources) * self.rows * self.row_bytes

    def chunks(self, read: Read) -> Iterator[bytes]:
        """Its bytes, in order."""
        import numpy

        step = max(1, ENTRIES // max(self.row_bytes, 1))
        for at in range(0, self.rows, step):
            count = min(step, self.rows - at)
            parts = []
            for one in self.sources:
                piece = Copy(file=one.file, start=one.start + at * self.row_bytes, length=count * self.row_bytes)
                parts.append(numpy.frombuffer(read(piece), dtype=numpy.uint8).reshape(count, self.row_bytes))
            yield numpy.concatenate(parts, axis=1).tobytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Normal noise: `share` of the root mean square of the part, drawn from `seed`."""

    share: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows and columns of a stored matrix of `shape`, times `factor`, plus noise. None: all rows, or all columns.

    A range has step 1.
    """

    source: Copy
    dtype: str
    shape: tuple[int, int]
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    factor: float = 1.0
    noise: Noise | None = None

    @property
    def new_shape(self) -> tuple[int, int]:
        return (
            self.shape[0] if self.rows is None else len(self.rows),
            self.shape[1] if self.columns is None else len(self.columns),
        )

    @property
    def length(self) -> int:
        return self.new_shape[0] * self.new_shape[1] * BITS[self.dtype] // 8

    def chunks(self, read: Read) -> Iterator[bytes]:
        """Its bytes, in order."""
        import torch

        scale, generator = 0.0, torch.Generator()
        if self.noise is not None:
            squares = sum(float(block.double().square().sum()) for block in self._blocks(read))
            scale = self.noise.share * self.factor * (squares / max(1, self.new_shape[0] * self.new_shape[1])) ** 0.5
            generator.manual_seed(self.noise.seed)
        for block in self._blocks(read):
            if self.factor == 1 and self.noise is None:
                yield _plain(block)
                continue
            made = block.double() * self.factor
            if self.noise is not None:
                made += scale * torch.randn(made.shape, generator=generator, dtype=torch.float64)
            yield as_bytes(made, self.dtype)

    def _blocks(self, read: Read) -> Iterator[Tensor]:
        """The part, some rows at a time. Rows that are no range (of step 1) are taken from the whole matrix."""
        import torch

        columns: Any = slice(None) if self.columns is None else self.columns
        columns = slice(columns.start, columns.stop) if isinstance(columns, range) else columns
        rows = range(self.shape[0]) if self.rows is None else self.rows
        step = max(1, ENTRIES // max(self.shape[1], 1))
        row = self.shape[1] * BITS[self.dtype] // 8
        whole = None if isinstance(rows, range) else as_tensor(read(self.source), self.dtype).view(self.shape)
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            if whole is None:
                piece = Copy(file=self.source.file, start=self.source.start + some[0] * row, length=len(some) * row)
                yield as_tensor(read(piece), self.dtype).view(len(some), self.shape[1])[:, columns]
            else:
                yield whole[torch.as_tensor(some)][:, columns]


def as_tensor(data: bytes, dtype: str) -> Tensor:
    """Bytes of entries of a stored type, as a tensor of one axis.

    Raises:
        SecateurError: a type that cannot be computed with.
    """
    import torch

    from secateur.files.dtypes import TORCH_DTYPES

    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise SecateurError(f"tensors of type {dtype} cannot be computed with, expected F16, BF16, F32 or F64")
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]) if data else torch.empty(0)


def as_bytes(values: Tensor, dtype: str) -> bytes:
    """Values rounded to a stored type, as bytes."""
    from secateur.files.dtypes import TORCH_DTYPES

    return _plain(values.to(TORCH_DTYPES[dtype]))


def _plain(values: Tensor) -> bytes:
    import torch

    return values.contiguous().view(torch.uint8).numpy().tobytes()
