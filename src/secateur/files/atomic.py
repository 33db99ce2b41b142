"""Write files so that a crash leaves either the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from secateur.files.lock import held, is_ours
from secateur.files.refused import naming


def atomic_write(
    path: Path | str, content: str | bytes | Iterable[bytes | memoryview], *, in_work_folder: bool = False
) -> None:
    """Write `content`, or its pieces one after another, beside `path`, flush it to the disk, then rename it into place.

    What a killed process left beside the same `path` is removed first; a process that is still alive keeps its own.

    Args:
        in_work_folder: do not look for what was left: the folder has many files, and goes as a whole.

    Raises:
        OSError: the disk is full or the folder cannot be written, and names `path`; an existing `path` is untouched.
    """
    path = Path(path)
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    pieces = [content] if isinstance(content, bytes) else content
    try:
        if not in_work_folder:
            remove_unfinished(path)
        with _new_file(path) as (file, temporary):
            try:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        fsync_folder(path.parent)
    except OSError as error:
        raise _of_file(error, path) from error


def write_together(writers: Mapping[Path, Callable[[], None]]) -> None:
    """Call what writes each file; after an error or an interruption none of those that are new is there.

    Raises:
        OSError: the disk is full or a folder cannot be written.
    """
    new = [path for path in writers if not path.exists()]
    try:
        for write in writers.values():
            write()
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Take away what killed calls of `atomic_write` left beside `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    for leftover in found:
        with held(leftover) as alone:
            if alone and leftover.is_file():
                leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path`, locked while it is open, so that nobody takes it for a leftover."""
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
        # Not tempfile, which would take the file from everybody but its owner.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if is_ours(file.fileno(), temporary):
                yield file, temporary
                return


def _of_file(error: OSError, path: Path) -> OSError:
    """The same error with the name of the file that was to be written, which `write` and `fsync` do not know."""
    is_of_another = error.filename and not Path(str(error.filename)).name.startswith(f".{path.name}.")
    return error if error.errno is None or is_of_another else type(error)(error.errno, error.strerror, str(path))


def fsync_file(path: Path) -> None:
    """Put on the disk what was written.

    Raises:
        OSError: the disk refused; it names the file.
    """
    with path.open("rb") as file, naming(path):
        os.fsync(file.fileno())


@contextlib.contextmanager
def flushed_meanwhile() -> Iterator[Callable[[Path], None]]:
    """Gives what begins to put a file on the disk while other work goes on; all are there when the block ends well.

    Raises:
        OSError: the disk refused one.
    """
    with ThreadPoolExecutor(1) as pool:
        begun: list[Future[None]] = []
        try:
            yield lambda path: begun.append(pool.submit(fsync_file, path))
            for one in begun:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fsync_tree(folder: Path) -> None:
    """Put a folder with all files and folders in it on the disk, whoever wrote them."""
    for path, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(path, name))
        fsync_folder(Path(path))


def fsync_folder(folder: Path) -> None:
    """Make renames and new entries in `folder` survive a power cut.

    Raises:
        OSError: the disk refused; it names the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
