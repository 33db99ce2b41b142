"""Open a file that somebody else named, so that whatever lies there ends in bytes or in one SecateurError."""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from secateur.errors import SecateurError
from secateur.files.refused import UNREADABLE, naming

PATIENCE = 10
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
)


@contextlib.contextmanager
def opened(path: Path, *, where: str | None = None, pipes: bool = False) -> Iterator[BinaryIO]:
    """A regular file, open to be read from its beginning.

    Args:
        where: its name in messages; its path where nothing is given.
        pipes: a pipe will do, as the shell's <(...) makes it, to which somebody writes within `PATIENCE` seconds.

    Raises:
        SecateurError: it is not there, is something else, or cannot be opened; the message names it and the reason.
    """
    where = str(path) if where is None else where
    try:
        # not blocking: to open a pipe would wait until somebody writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise SecateurError(f"{where}: cannot be read ({why_not(path, error)})") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            raise SecateurError(f"{where}: cannot be read (it is {_kind(mode)}, expected a file)")
        if stat.S_ISFIFO(mode) and not _has_writer(descriptor):
            raise SecateurError(f"{where}: cannot be read (it is a pipe, and nobody has written to it)")
        os.set_blocking(descriptor, True)
        stack.pop_all()
        with os.fdopen(descriptor, "rb") as file, naming(path, UNREADABLE):
            yield file


def read_bytes(path: Path, *, most: int, where: str | None = None) -> bytes:
    """All that a regular file holds.

    Args:
        most: bytes of the largest file that is read.

    Raises:
        SecateurError: as `opened`, or it is larger.
    """
    with opened(path, where=where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise SecateurError(f"{where or path}: {size} bytes, expected at most {most}")
        return file.read(most)


def why_not(path: Path, error: Exception) -> str:
    """Why a file could not be opened, in words."""
    with contextlib.suppress(OSError, ValueError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode) and not path.exists():
            return "it is a link to nothing"
        if kind := _kind(os.stat(path).st_mode):
            return f"it is {kind}, expected a file"
    return getattr(error, "strerror", None) or str(error)


def _has_writer(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(PATIENCE * 1000))


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS if is_kind(mode)), "")
