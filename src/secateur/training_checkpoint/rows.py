"""Read rows of a stored tensor, with no more memory than they take: only their bytes are read from the disk."""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.refused import naming
from secateur.training_checkpoint.stored import Chunk, StoredBytes, StoredTensor

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of an entry in a zip file (APPNOTE 4.3.7)


def read_bytes(place: StoredBytes) -> bytes:
    """An opaque entry as it is, never unpickled."""
    with place.path.open("rb") as file:
        file.seek(place.start)
        data = file.read(place.length)
    if len(data) != place.length:
        raise SecateurError(f"{place.path}: {len(data)} of {place.length} bytes at {place.start}; it is truncated")
    return data


def read_rows(tensor: StoredTensor, rows: Sequence[int]) -> Tensor:
    """The entries `rows` of axis 0, in this order; a tensor without axes is its own only row, 0.

    Returns a contiguous tensor (len(rows), *tensor.shape[1:]) on the CPU, () for a tensor without axes.
    Raises SecateurError when a file does not hold what the checkpoint says.
    """
    if not tensor.shape:
        scalar = torch.empty(1, dtype=tensor.dtype)
        _read_into(scalar, tensor, tensor.chunks[0], 0)
        return scalar[0]
    out = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
    for chunk in tensor.chunks:
        window = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
        for to, row, count in _runs(rows, chunk.offsets[0], chunk.sizes[0]):
            target = out[to : to + count]
            if chunk.sizes[1:] == tensor.shape[1:]:
                _read_into(target, tensor, chunk, row)
            else:
                block = torch.empty((count, *chunk.sizes[1:]), dtype=tensor.dtype)
                _read_into(block, tensor, chunk, row)
                target[(slice(None), *window)] = block
    return out


def _runs(rows: Sequence[int], first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(place in rows, row of the chunk, length) of each run of neighbouring rows that a chunk holds."""
    if isinstance(rows, range) and rows.step == 1:
        start, stop = max(rows.start, first), min(rows.stop, first + count)
        if start < stop:
            yield start - rows.start, start - first, stop - start
        return
    to = 0
    while to < len(rows):
        length = 1
        if first <= rows[to] < first + count:
            while to + length < len(rows) and rows[to + length] == rows[to] + length < first + count:
                length += 1
            yield to, rows[to] - first, length
        to += length


def _read_into(target: Tensor, tensor: StoredTensor, chunk: Chunk, row: int) -> None:
    """Fill `target` with the rows of a chunk from `row` on."""
    start = _first_entry(tensor.name, tensor.dtype, chunk)
    if start is None:
        whole = _load(tensor.name, tensor.dtype, chunk, "cpu")
        target.copy_(whole[row : row + len(target)] if chunk.sizes else whole)
        return
    start += row * math.prod(chunk.sizes[1:]) * tensor.dtype.itemsize
    flat: Any = target.flatten().view(torch.uint8).numpy()  # flatten: a view, target being contiguous
    view = memoryview(flat)
    descriptor = os.open(chunk.place.path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            with naming(chunk.place.path):
                read = os.preadv(descriptor, [view[done:]], start + done)
            if not read:
                raise SecateurError(f"{chunk.place.path}: it ends inside {tensor.name}")
            done += read
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=4096)
def _first_entry(name: str, dtype: torch.dtype, chunk: Chunk) -> int | None:
    """Where in its file the entries of a chunk start, row after row; None when they are stored in another order."""
    place = chunk.place
    if not chunk.is_archive:
        return place.start
    described = _load(name, dtype, chunk, "meta")
    try:
        with _Window(place) as window, zipfile.ZipFile(window) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            data = records["data/0"]
            little = "byteorder" not in records or archive.read(records["byteorder"]) == b"little"
        with place.path.open("rb") as file:
            file.seek(place.start + data.header_offset)
            header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    except (zipfile.BadZipFile, KeyError, struct.error, OSError, NotImplementedError) as error:
        raise SecateurError(f"{place.path}: {name} is damaged ({error})") from error
    size = described.untyped_storage().nbytes()
    first: int = data.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
    if header[0] != b"PK\3\4" or data.file_size != size or first + size > place.length:
        raise SecateurError(f"{place.path}: {name} is damaged (its data is not where its archive says)")
    if data.compress_type != zipfile.ZIP_STORED or not little or sys.byteorder != "little":
        return None
    if not described.is_contiguous():
        return None
    return place.start + first + int(described.storage_offset()) * dtype.itemsize


def _load(name: str, dtype: torch.dtype, chunk: Chunk, device: str) -> Tensor:
    try:
        with _Window(chunk.place) as window:
            tensor: Tensor = torch.load(cast("IO[bytes]", window), map_location=device, weights_only=True)
    except Exception as error:  # torch has many for a broken archive: RuntimeError, UnpicklingError, EOFError, ...
        raise SecateurError(f"{chunk.place.path}: {name} cannot be read ({error!s:.200})") from error
    about = (tuple(tensor.shape), tensor.dtype, tensor.layout) if type(tensor) is Tensor else None
    if about != (chunk.sizes, dtype, torch.strided):
        found = about or type(tensor).__name__
        raise SecateurError(f"{chunk.place.path}: {name} holds {found}, expected {chunk.sizes} {dtype}")
    return tensor


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, place: StoredBytes) -> None:
        super().__init__()
        self._file = Path(place.path).open("rb")  # noqa: SIM115 - closed with the window
        self._place = place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.length}[whence]
        if base + offset < 0:
            raise OSError("before the start of the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(0, min(len(view), self._place.length - self._at))
        self._file.seek(self._place.start + self._at)
        read = self._file.readinto(view[:count])
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
