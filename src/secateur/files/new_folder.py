"""A folder that is written as a whole: under its name lies nothing, or all of it."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, fsync_folder, fsync_tree
from secateur.files.exchange import exchange
from secateur.files.json import read_object
from secateur.files.lock import held
from secateur.files.records import as_record
from secateur.files.refused import UNREADABLE, naming


def check_target(source: Path, out: Path, option: str = "--out") -> None:
    """Refuse a target that is not free or that mixes with the source.

    Raises:
        SecateurError: the source is no folder; `out` is it, inside it, around it, or holds something.
    """
    check_apart(source, out, option)
    check_free(out, option)


def check_apart(source: Path, out: Path, option: str = "--out") -> None:
    """Raises SecateurError: the source is no folder, or the target is it, inside it or around it."""
    if not source.is_dir():
        raise SecateurError(f"{source}: not a folder, expected a checkpoint")
    here, there = source.resolve(), out.resolve()
    if here == there or there.is_relative_to(here) or here.is_relative_to(there):
        raise SecateurError(f"{option} {out}: it and the source {source} are the same or inside each other")


def check_free(out: Path, option: str = "--out") -> None:
    """Raises SecateurError: a folder cannot be written here, as it holds something or is none."""
    if is_occupied(out):
        raise occupied(out, option=option)


def occupied(out: Path, why: object = None, *, option: str = "--out") -> SecateurError:
    """The error about a target that is not free. why: what the command would have written is another thing."""
    more = "" if why is None else f", and not what this command would write: {why}"
    return SecateurError(f"{option} {out}: it is there already and not an empty folder{more}")


def same_folders(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes, and no links."""
    files = [{path.relative_to(root): path for path in root.rglob("*") if not path.is_dir()} for root in (one, other)]
    return files[0].keys() == files[1].keys() and all(
        not path.is_symlink() and path.is_file() and filecmp.cmp(path, files[1][name], shallow=False)
        for name, path in files[0].items()
    )


def is_occupied(out: Path) -> bool:
    """Whether more than an empty folder has this name."""
    return out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))


IS_THERE = "is_there"  # in what a function returns: the result was there already, and nothing had to be written


@contextlib.contextmanager
def compared_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into, compared with `out` when the block ends well, and removed in any case.

    Raises:
        SecateurError: they differ. OSError: the disk refused.
    """
    with _hidden(out.resolve()) as beside:
        yield beside
        if not same_folders(beside, out):
            raise occupied(out, "its files are others")
        shutil.rmtree(beside)


@contextlib.contextmanager
def written_beside(out: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A new folder beside `out` to write into, renamed to `out` when the block ends well and removed when it does not.

    What a killed process left beside the same `out` is removed first; a process that is still alive keeps its own.

    Args:
        replaces: change places with the folder `out`, in one step, and remove that then. A kill before leaves the old
            one under the name, a kill after the new one.

    Raises:
        OSError: the disk refused, cannot exchange two folders, or `out` has been filled or the new folder taken away
            meanwhile; nothing new is left.
    """
    out = out.resolve()  # "." has no name
    with _hidden(out, replaces) as beside:
        number = beside.stat().st_ino
        yield beside
        _flush(beside, number)
        (exchange if replaces else _rename)(beside, out)
    fsync_folder(out.parent)
    if replaces:
        shutil.rmtree(beside)  # the old one


@contextlib.contextmanager
def written_together(out: Path, side: Path, *, replaces: bool = False) -> Iterator[tuple[Path, Path]]:
    """The same for two folders: both get their names, or none does; see also `roll_back`. Only `out` is replaced."""
    out, side = out.resolve(), side.resolve()
    with _hidden(out, replaces) as beside, _hidden(side) as other:
        numbers = beside.stat().st_ino, other.stat().st_ino
        yield beside, other
        for folder, number in zip((beside, other), numbers, strict=True):
            _flush(folder, number)
        note = _note_of_pair(out)
        pair = Pair(side=str(side), partial=beside.name, number=numbers[0])
        atomic_write(note, json.dumps(msgspec.structs.asdict(pair)) + "\n")
        try:
            _rename(other, side)
            (exchange if replaces else _rename)(beside, out)
        except BaseException:
            if _is_folder(beside, pair.number) and not other.exists():
                os.rename(side, other)
            raise
        finally:
            note.unlink(missing_ok=True)
    for folder in {out.parent, side.parent}:
        fsync_folder(folder)
    if replaces:
        shutil.rmtree(beside)  # the old one


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies beside `out` while two folders get their names.

    side: the name of the other folder. partial: of the one that will be `out`, until then. number: of that folder; the
    one that it replaces gets the name `partial` then.
    """

    side: str
    partial: str
    number: int


def roll_back(out: Path, side: Path) -> None:
    """Take `side` away again if a process was killed when that had its name and `out` did not have its own yet.

    Raises:
        SecateurError: what such a process left is damaged. OSError: the disk refused.
    """
    out, side = out.resolve(), side.resolve()
    note = _note_of_pair(out)
    if not note.is_file():
        return
    pair = as_record(read_object(note), Pair, str(note))
    partial = out.parent / pair.partial
    if pair.side != str(side) or not _pattern(out).fullmatch(pair.partial):
        return
    if _is_folder(partial, pair.number):
        with held(partial) as alone:
            if not alone:
                return
            if side.is_dir() and not side.is_symlink():
                gone = _new_name(side)
                os.rename(side, gone)  # so that a kill leaves no half of it under its name
                shutil.rmtree(gone)
    note.unlink(missing_ok=True)


@contextlib.contextmanager
def _hidden(out: Path, replaces: bool = False) -> Iterator[Path]:
    """A new folder beside `out`, gone afterwards unless it has got another name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    beside, other = _new_name(out), _new_name(out)
    try:
        beside.mkdir()
        if replaces:
            _check_exchangeable(beside, other)
        with held(beside):
            yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _flush(folder: Path, number: int) -> None:
    """Put a finished folder on the disk. What makes folders as it needs them has made one anew if this one went."""
    if not _is_folder(folder, number):
        raise OSError(errno.ENOENT, "it was taken away while it was written to", str(folder))
    fsync_tree(folder)


def _is_folder(path: Path, number: int) -> bool:
    return path.is_dir() and path.stat().st_ino == number


def _check_exchangeable(one: Path, other: Path) -> None:
    """Before anything is written; both are removed with what a killed process left."""
    other.mkdir()
    try:
        exchange(one, other)
    finally:
        other.rmdir()


def _rename(beside: Path, out: Path) -> None:
    try:
        os.rename(beside, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OSError(error.errno, "it has been filled by another process meanwhile", str(out)) from error


def _new_name(out: Path) -> Path:
    return out.parent / f".{out.name}.{secrets.token_hex(8)}.partial"


def _pattern(out: Path) -> re.Pattern[str]:
    return re.compile(re.escape(f".{out.name}.") + r"[0-9a-f]{16}\.partial")


def _note_of_pair(out: Path) -> Path:
    return out.parent / f".{out.name}.pair.json"


def copy_file(source: Path, target: Path) -> None:
    """A new file with the bytes of `source`, on the disk when this returns; makes the folders it lies in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target), source.open("rb") as old, target.open("xb") as new:
        with naming(source, UNREADABLE):
            shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def remove_leftovers(out: Path) -> None:
    """Take away the folders that killed processes left beside `out`; a process that is still alive keeps its own."""
    pattern = _pattern(out)
    for folder in out.parent.iterdir():
        if pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with held(folder) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)
