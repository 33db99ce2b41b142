"""A lock on a folder, for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Keep a lock on a folder; the system lets go of it when the process ends, however it ends.

    False where another process has it, or where the disk knows no locks: then leftovers stay.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)
