"""A lock for one process at a time; the system frees it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import SecateurError


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made, and is gone afterwards; one that a killed process left is taken over.

    Raises:
        SecateurError: another process holds it; `refusal` is the message.
        OSError: the file cannot be made, or the disk knows no locks.
    """
    with path.open("w") as file:
        if not _is_taken(file.fileno(), path):
            raise SecateurError(refusal)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder itself, which can be renamed meanwhile.

    False where another process has it, or where the disk knows no locks: then leftovers stay.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            alone = _is_taken(descriptor, folder)
        except OSError:
            alone = False
        yield alone


def is_ours(descriptor: int, path: Path) -> bool:
    """Lock a new file; True also where the disk knows no locks, False where another process took it for a leftover."""
    try:
        return _is_taken(descriptor, path)
    except OSError:
        return True


def _is_taken(descriptor: int, path: Path) -> bool:
    """Try for the lock; False where another process has it, or has just left and taken away what was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
