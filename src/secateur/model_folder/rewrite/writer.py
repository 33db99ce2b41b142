"""Write safetensors files from pieces, most of them bytes of other files, holding no more than a buffer of them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import fsync_file
from secateur.files.progress import OnChunk
from secateur.files.refused import FULL, UNREADABLE, naming
from secateur.files.safetensors_header import BITS, LENGTH, MAX_HEADER, header_bytes
from secateur.model_folder.read.tensor_files import TensorFiles
from secateur.model_folder.rewrite.computed import Beside, Mean, Part
from secateur.model_folder.rewrite.pieces import Copy, NewTensor, Piece

STEP = 64 * 2**20  # bytes the system copies at once, so that progress is seen
MOST_OPEN = 16  # source files: a mean reads as many by turns as it has sources
BUFFER = 4 * 2**20  # bytes in memory, where the system cannot copy by itself
CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file to write."""

    file: str
    tensors: tuple[NewTensor, ...]


def into_shards(tensors: Sequence[NewTensor], limit: int | None, *, stem: str = "model") -> list[Shard]:
    """Tensors in files of at most `limit` bytes each (a larger tensor has a file of its own), in their order.

    Without a limit there is one file, which needs no index.
    """
    groups: list[list[NewTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or (limit is not None and tensor.length > room):
            groups.append([])
            room = limit or 0
        groups[-1].append(tensor)
        room -= tensor.length
    ends = [""] if limit is None else [f"-{n:05d}-of-{len(groups):05d}" for n in range(1, len(groups) + 1)]
    return [
        Shard(file=f"{stem}{end}.safetensors", tensors=_aligned(group)) for end, group in zip(ends, groups, strict=True)
    ]


def write_shard(
    shard: Shard,
    source: Callable[[str], Path],
    target: Path,
    metadata: Mapping[str, str],
    on_chunk: OnChunk,
    *,
    flush: Callable[[Path], object] = fsync_file,
    writer: type[Writer] | None = None,
) -> None:
    """Write one file and flush it to the disk.

    Args:
        source: the path of a file that a piece names.
        flush: what puts the file on the disk, or begins to. writer: what takes the pieces; a `Writer`.

    Raises:
        OSError: the disk refused. SecateurError: a source file has become shorter, the header would be too long, or a
            piece is of a kind that APPEND does not know.
    """
    header = _header(shard.tensors, metadata)
    with (writer or Writer)(target, source, on_chunk, flush) as opened:
        opened.put(header)
        for tensor in shard.tensors:
            for piece in tensor.pieces:
                opened.append(piece)


def index_of(shards: Iterable[Shard], metadata: Mapping[str, object]) -> str:
    """The list of the files' tensors, as transformers reads it."""
    listed = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": dict(metadata), "weight_map": dict(sorted(listed.items()))}
    return json.dumps(index, indent=2) + "\n"


def file_metadata(folder: TensorFiles) -> dict[str, str]:
    """Of every file written: what the headers of the source's files agree on."""
    texts = [set(header.metadata.items()) for header in folder.headers.values()]
    return {"format": "pt"} | dict(sorted(set.intersection(*texts)))


class Writer:
    """A new file that takes pieces, one after another; it is flushed when the block ends, see `write_shard`."""

    def __init__(
        self,
        target: Path,
        source: Callable[[str], Path],
        on_chunk: OnChunk,
        flush: Callable[[Path], object] = fsync_file,
    ) -> None:
        self._target, self._source, self._on_bytes, self._flush = target, source, on_chunk, flush
        self._open: dict[str, int] = {}

    def __enter__(self) -> Writer:
        self._out = os.open(self._target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for descriptor in (self._out, *self._open.values()):
            os.close(descriptor)
        if kind is None:
            self._flush(self._target)

    def append(self, piece: Piece) -> None:
        """Append the bytes of a piece by the rule for its kind, and report them."""
        if type(piece) not in APPEND:
            known = ", ".join(kind.__name__ for kind in APPEND)
            raise SecateurError(f"{self._target}: a piece {piece!r:.200}, expected one of {known}")
        APPEND[type(piece)](self, piece)

    def put(self, data: bytes, *, of_piece: bool = False) -> None:
        """Append bytes; those that belong to a piece are reported."""
        view = memoryview(data)
        while view:
            with naming(self._target):
                written = os.write(self._out, view)
            view = view[written:]
            if of_piece:
                self._on_bytes(written)

    def copy(self, piece: Copy) -> None:
        file, start, length = piece.file, piece.start, piece.length
        descriptor = self._opened(file)
        while length:
            with naming(self._source(file), UNREADABLE):
                copied = self._some(descriptor, start, min(length, STEP))
            if copied == 0:
                raise SecateurError(f"{self._source(file)}: it has become shorter while it was read")
            start, length = start + copied, length - copied

    def computed(self, piece: Mean | Part | Beside) -> None:
        for chunk in piece.chunks(self._all_of):
            self.put(chunk, of_piece=True)

    def _all_of(self, piece: Copy) -> bytes:
        """The bytes of a copy, in memory."""
        found = bytearray()
        descriptor = self._opened(piece.file)
        while len(found) < piece.length:
            with naming(self._source(piece.file), UNREADABLE):
                data = os.pread(descriptor, piece.length - len(found), piece.start + len(found))
            if not data:
                raise SecateurError(f"{self._source(piece.file)}: it has become shorter while it was read")
            found += data
        return bytes(found)

    def _opened(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= MOST_OPEN:
                for descriptor in self._open.values():
                    os.close(descriptor)
                self._open = {}
            self._open[file] = os.open(self._source(file), os.O_RDONLY)
        return self._open[file]

    def _some(self, descriptor: int, start: int, length: int) -> int:
        """Copy and report some of the bytes: how many."""
        if hasattr(os, "copy_file_range"):
            try:
                with naming(self._target, FULL):
                    copied = os.copy_file_range(descriptor, self._out, length, offset_src=start)
                if copied:
                    self._on_bytes(copied)
                    return copied  # some file systems say 0 where they mean that they cannot
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
        return self._through_memory(descriptor, start, length)

    def _through_memory(self, descriptor: int, start: int, length: int) -> int:
        data = os.pread(descriptor, min(length, BUFFER), start)
        self.put(data, of_piece=True)
        return len(data)


# kind of a piece -> what appends its bytes and reports them
APPEND: Mapping[type, Callable[[Writer, Any], None]] = MappingProxyType(
    {Copy: Writer.copy, Mean: Writer.computed, Part: Writer.computed, Beside: Writer.computed}
)


def _header(tensors: Iterable[NewTensor], metadata: Mapping[str, str]) -> bytes:
    header = header_bytes({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, metadata)
    if len(header) > LENGTH.size + MAX_HEADER:
        raise SecateurError(f"a file with a header of {len(header)} bytes, the format allows {MAX_HEADER}")
    return header


def _aligned(tensors: Iterable[NewTensor]) -> tuple[NewTensor, ...]:
    """Wide types first, as safetensors writes them, so that every tensor begins at a multiple of its entries' size."""
    return tuple(sorted(tensors, key=lambda tensor: -BITS[tensor.dtype]))
