"""Where the files of a result go: to the disk, or into a comparison with those that are there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, fsync_file
from secateur.files.new_folder import copy_file
from secateur.files.progress import OnChunk
from secateur.files.refused import naming
from secateur.model_folder.rewrite.compare import same_files
from secateur.model_folder.rewrite.writer import Shard, Writer, write_shard
from secateur.plans import Plan, is_side_file


class Target:
    """Writes every file that it is given; `flush` puts one of weights on the disk, or begins to."""

    _writer: type[Writer] = Writer

    def __init__(self, flush: Callable[[Path], object] = fsync_file) -> None:
        self._flush = flush

    def shard(
        self,
        shard: Shard,
        source: Callable[[str], Path],
        path: Path,
        metadata: Mapping[str, str],
        on_chunk: OnChunk,
    ) -> None:
        """A file of weights, see `write_shard`."""
        write_shard(shard, source, path, metadata, on_chunk, flush=self._flush, writer=self._writer)

    def text(self, path: Path, content: str | bytes) -> None:
        """A small file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)

    def copy(self, source: Path, path: Path) -> None:
        """A file as it is."""
        copy_file(source, path)

    def plan(self, path: Path, plan: Plan) -> None:
        """A plan, with the file of its arrays."""
        plan.save(path)


class DifferentError(SecateurError):
    """What is there is not what would be written."""


class Comparer(Writer):
    """Takes the same pieces as a Writer, and compares them with a file that is there."""

    def __enter__(self) -> Comparer:
        self._out = os.open(self._target, os.O_RDONLY)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        is_longer = kind is None and os.read(self._out, 1) != b""
        super().__exit__(kind, *rest)
        if is_longer:
            raise DifferentError(f"{self._target} would be another")

    def put(self, data: bytes, *, of_piece: bool = False) -> None:
        view = memoryview(data)
        while view:
            with naming(self._target):
                found = os.read(self._out, len(view))
            if not found or found != view[: len(found)]:
                raise DifferentError(f"{self._target} would be another")
            view = view[len(found) :]
            if of_piece:
                self._on_bytes(len(found))

    def _some(self, descriptor: int, start: int, length: int) -> int:
        return self._through_memory(descriptor, start, length)


class Comparison(Target):
    """Compares, byte for byte, and writes nothing; raises `DifferentError`, which names the file."""

    _writer = Comparer

    def __init__(self) -> None:
        super().__init__(flush=lambda path: None)
        self._same: set[Path] = set()

    def shard(self, shard: Shard, source: Callable[[str], Path], path: Path, *rest: Any) -> None:
        self._expect(path, path.is_file())
        super().shard(shard, source, path, *rest)

    def text(self, path: Path, content: str | bytes) -> None:
        wanted = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        self._expect(path, path.is_file() and path.read_bytes() == wanted)

    def copy(self, source: Path, path: Path) -> None:
        self._expect(path, path.is_file() and same_files(source, path))

    def plan(self, path: Path, plan: Plan) -> None:
        self._expect(path, path.is_file() and Plan.load(path) == plan)

    def check_nothing_else(self, folder: Path, plan: str) -> None:
        """Raises DifferentError: a file that would not be written. plan: name of the one that may have a side file."""
        for path in sorted(folder.rglob("*")):
            is_known = path in self._same or path.is_dir() or is_side_file(str(path.relative_to(folder)), plan)
            if path.is_symlink() or not is_known:
                raise DifferentError(f"{path} would not be written")

    def _expect(self, path: Path, is_same: bool) -> None:
        if not is_same:
            raise DifferentError(f"{path} would be another")
        self._same.add(path)
