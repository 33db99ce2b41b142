"""A folder that is written as a whole: under its name lies nothing, or all of it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import SecateurError
from secateur.files.atomic import fsync_folder, fsync_tree
from secateur.files.lock import held


def check_target(source: Path, out: Path, option: str = "--out") -> None:
    """Refuse a target that is not free or that mixes with the source.

    Raises:
        SecateurError: the source is no folder; `out` is it, inside it, around it, or holds something.
    """
    if not source.is_dir():
        raise SecateurError(f"{source}: not a folder, expected a checkpoint")
    here, there = source.resolve(), out.resolve()
    if here == there or there.is_relative_to(here) or here.is_relative_to(there):
        raise SecateurError(f"{option} {out}: it and the source {source} are the same or inside each other")
    check_free(out, option)


def check_free(out: Path, option: str = "--out") -> None:
    """Raises SecateurError: a folder cannot be written here, as it holds something or is none."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise SecateurError(f"{option} {out}: it is there already and not an empty folder")


@contextlib.contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into, renamed to `out` when the block ends well and removed when it does not.

    What a killed process left beside the same `out` is removed first; a process that is still alive keeps its own.

    Raises:
        OSError: the disk refused, or `out` has been filled meanwhile; nothing new is left.
    """
    out = out.resolve()  # "." has no name
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    beside = out.parent / f".{out.name}.{secrets.token_hex(8)}.partial"
    try:
        beside.mkdir()
        with held(beside):
            yield beside
            fsync_tree(beside)
            os.rename(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    fsync_folder(out.parent)


def copy_file(source: Path, target: Path) -> None:
    """A new file with the bytes of `source`, on the disk when this returns; makes the folders it lies in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def _remove_leftovers(out: Path) -> None:
    pattern = re.compile(re.escape(f".{out.name}.") + r"[0-9a-f]{16}\.partial")
    for folder in out.parent.iterdir():
        if pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with held(folder) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)
