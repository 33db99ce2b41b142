"""What unfinished work keeps beside its target, so that the next start goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.going_on import told_how_to_go_on
from secateur.files.json import read_object
from secateur.files.lock import locked
from secateur.files.records import as_record

T = TypeVar("T")
NOTE, LOCK = "asked.json", "lock"


@dataclass(frozen=True, kw_only=True)
class Work(Generic[T]):
    """The folder of one. `before` is what its last start was asked for, None at the first; `noted` is that file."""

    path: Path
    noted: Path
    before: T | None

    def entries(self) -> list[Path]:
        """What is in it, the note first."""
        entries = [entry for entry in self.path.iterdir() if entry.name != LOCK]
        return sorted(entries, key=lambda entry: entry != self.noted)

    def note(self, asked: Mapping[str, Any]) -> None:
        """Write down what this start is asked for."""
        atomic_write(self.noted, json.dumps(asked, indent=2, sort_keys=True) + "\n")

    def clear(self) -> None:
        """Throw away what is in it, the note first: what a kill leaves counts for nothing."""
        _remove(self.entries())

    def remove(self) -> None:
        """Take away what is in it, the note last: as long as it is there, the next start knows what was done."""
        _remove(reversed(self.entries()))


def place_of_work(out: Path, what: str = "pruning") -> Path:
    """The work folder of `what` is done into `out`; each kind of work has one of its own."""
    out = out.resolve()  # "." has no name
    return out.parent / f".{out.name}.{what}"


@contextlib.contextmanager
def work_folder(
    path: Path,
    kind: type[T],
    refusal: str,
    *,
    restart: bool = False,
    note: str = NOTE,
    going_on: str = "run the same command again to resume",
) -> Iterator[Work[T]]:
    """The work folder at `path`, for one process at a time; an empty one goes again.

    Args:
        kind: the type of what a start is asked for, see `as_record`. refusal: the message where another process is
            at it. restart: throw away what is in it. note: name of the file that says what a start was asked for.
        going_on: what an interruption says, where something is left to go on from.

    Raises:
        SecateurError: another process is at it, or what lies in it is damaged.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path / LOCK, refusal):
            found = Work[T](path=path, noted=path / note, before=None)
            if restart:
                found.clear()
            with told_how_to_go_on(going_on, found.noted.exists):
                yield dataclasses.replace(found, before=_read(found.noted, kind))
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # of work that is finished, or of a start that was refused before it began


def as_noted(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked` as it comes back from a note: tuples are lists, keys are texts."""
    noted: dict[str, Any] = json.loads(json.dumps(asked))
    return noted


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values are not the same."""
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def _read(noted: Path, kind: type[T]) -> T | None:
    try:
        return as_record(read_object(noted), kind, str(noted)) if noted.is_file() else None
    except SecateurError as error:
        raise SecateurError(f"{error}; not what an unfinished run writes, use --restart") from error


def _remove(entries: Iterable[Path]) -> None:
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
