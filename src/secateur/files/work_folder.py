"""What an unfinished pruning or fine-tuning keeps beside its target, so that the next start goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_object

ASKED, STATS, PLAN = "asked.json", "stats.safetensors", "plan.json"


@dataclass(frozen=True, kw_only=True)
class Work:
    """The folder of one. `before` is what its last start was asked for, None at the first."""

    path: Path
    before: Mapping[str, Any] | None

    @property
    def stats(self) -> Path:
        """The statistics, once they are finished; an unfinished pass keeps what it has beside them."""
        return self.path / STATS

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    def note(self, asked: Mapping[str, Any]) -> None:
        """Write down what this start is asked for."""
        atomic_write(self.path / ASKED, json.dumps(asked, indent=2, sort_keys=True) + "\n")

    def remove(self) -> None:
        """Take the folder away, the note last: as long as it is there, the next start knows what was done."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == ASKED):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.path.rmdir()


def place_of_work(out: Path, what: str = "pruning") -> Path:
    out = out.resolve()  # "." has no name
    return out.parent / f".{out.name}.{what}"


@contextlib.contextmanager
def work_folder(out: Path, *, restart: bool = False, what: str = "pruning") -> Iterator[Work]:
    """The work folder of `out`, for one process at a time; an empty one goes again.

    Args:
        restart: throw away what is in it. what: is done into `out`; each kind of work has a folder of its own.

    Raises:
        SecateurError: another process is at it, or what lies in it is damaged.
    """
    path = place_of_work(out, what)
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SecateurError(f"--out {out}: another process is {what} into it (it holds {path})") from error
        noted = path / ASKED
        if restart:
            noted.unlink(missing_ok=True)  # first, so that what a kill leaves counts for nothing
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield Work(path=path, before=read_object(noted) if noted.is_file() else None)
        finally:
            with contextlib.suppress(OSError):
                path.rmdir()  # of a start that was refused before it began
    finally:
        os.close(descriptor)
