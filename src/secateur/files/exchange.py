"""Two folders that change their names in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: paths count from the working folder; swap, do not replace


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two things in the same file system; at no moment is there nothing under either.

    Raises:
        OSError: the system or the disk cannot do that; both stay as they are.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange two folders in one step", str(one))
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, f"two folders cannot be exchanged in one step here ({os.strerror(number)})", str(one))
