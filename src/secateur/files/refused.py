"""What other libraries raise when the disk refuses a write, as the OSError that it is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from secateur.errors import SecateurError, causes_of

# of a disk that takes no more: full, over the user's quota, or over the largest size of a file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSALS = (*FULL, errno.EIO, errno.EROFS, errno.ENXIO)
UNREADABLE = (errno.EIO, errno.ESTALE)  # of a read that failed, or of a file that is gone from a server
OF_RUST = re.compile(r"\(os error (\d+)\)")
PROBE = 64 * 2**10  # bytes that a disk which is not full takes


@contextlib.contextmanager
def naming(path: Path, only: Collection[int] | None = None) -> Iterator[None]:
    """Give an error of the system that names no file, as of `write` and `fsync`, the name of `path`.

    Args:
        only: of these numbers of `errno`, where other files may have failed: FULL is of a write, UNREADABLE of a read.

    Raises:
        OSError: with the name; one that has a name, or no number, is raised as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None or (only is not None and error.errno not in only):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def refused_by_the_disk(path: Path) -> Iterator[None]:
    """Make of what a library raises where it cannot write to `path`, a file or a folder, what it is.

    torch, safetensors and tokenizers raise errors of their own, some of which do not say why; then the disk is asked.

    Raises:
        OSError: the disk refused; it names the file. What has another cause is raised as it is.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        if refusal := refusal_in(error, path):
            raise refusal from error
        raise


def refusal_in(error: BaseException, path: Path) -> OSError | None:
    """What the disk said, of an error while `path` was written; None where it has another cause, or says it itself."""
    if isinstance(error, OSError) and error.errno is None and any(os.strerror(one) in str(error) for one in FULL):
        return None  # with more beside it, such as the rank that could not write
    told = _told(error)
    if told is None:
        return _asked(path)
    number, name = told
    return OSError(number, os.strerror(number), str(_newest(Path(name or path)) if number in FULL else name or path))


def refusal_in_words(error: BaseException) -> str:
    """The file and what the system says, without its number; of other errors their text."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _told(error: BaseException) -> tuple[int, str | None] | None:
    """(number, file or None) of the first error of the system among those that led to this one."""
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.errno is not None and (cause is error or cause.errno in REFUSALS):
            return cause.errno, None if cause.filename is None else str(cause.filename)
        if in_text := OF_RUST.search(str(cause)):
            return int(in_text[1]), None
        known = [number for number in FULL if os.strerror(number) in str(cause)]
        if known:
            return known[0], None
    return None


def _newest(path: Path) -> Path:
    """The file in a folder that was written to last, as the one that did not get its bytes was; a file is its own."""
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else []
    return max(files, key=lambda one: (one.stat().st_mtime_ns, one), default=path)


def _asked(path: Path) -> OSError | None:
    """What the disk says to more bytes at the end of the files that were written, or None if it takes them."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for file in files:
        try:
            _lengthen(file)
        except OSError as error:
            return OSError(error.errno, error.strerror, str(file))
    return None


def _lengthen(file: Path) -> None:
    """Add bytes to a file and take them away again; a file that is not there is made and removed."""
    is_new = not file.exists()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = PROBE
            while left:
                left -= os.pwrite(descriptor, b"\0" * left, size + PROBE - left)
            os.fsync(descriptor)
        finally:
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
        if is_new:
            file.unlink(missing_ok=True)
