"""Write files so that a crash leaves either the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path


def atomic_write(path: Path | str, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Write `content`, or its pieces one after another, beside `path`, flush it to the disk, then rename it into place.

    Raises:
        OSError: the disk is full or the folder cannot be written; an existing `path` is untouched.
    """
    path = Path(path)
    content = content.encode("utf-8") if isinstance(content, str) else content
    pieces = [content] if isinstance(content, bytes) else content
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    # Not tempfile, which would take the file from everybody but its owner.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def refused_by_the_disk(path: Path) -> Iterator[None]:
    """Make of what safetensors raises where it cannot write to `path` what it is.

    Raises:
        OSError: the disk refused.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def fsync_file(path: Path) -> None:
    """Put on the disk what another library wrote."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames and new entries in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
