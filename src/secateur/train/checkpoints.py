"""Which checkpoints of a run are whole, and of which run they are.

The Trainer writes a checkpoint file by file. When all files are on the disk, a list of them with their sizes is
renamed into the folder last; a folder without that list, or with a file of another size, was never finished. Of all but
the largest files the list has the SHA-256 too: a run goes on from what was written, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, fsync_folder, fsync_tree
from secateur.files.digest import sha256_of
from secateur.files.json import read_json
from secateur.files.records import Count, as_record
from secateur.files.refused import refusal_in, refusal_in_words
from secateur.train.distributed import launch

COMPLETE = "complete.json"
FORMAT = "secateur-checkpoint"
# Bytes of a file that is known by its SHA-256; of larger ones, which hold weights and the state of the optimizer, only
# the size is. To read hundreds of GB back on one rank at every checkpoint would take minutes.
SEALED = 2**26


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """complete.json: the run that a checkpoint is of, the bytes of each file, and the SHA-256 of those up to SEALED.

    Without `sha256` an earlier release wrote it.
    """

    format: Literal["secateur-checkpoint"]
    run: str
    sizes: Annotated[dict[str, Count], msgspec.Meta(min_length=1, description="an object with the size of each file")]
    sha256: dict[str, str] = {}


def seal(checkpoint: Path, run: str) -> None:
    """Flush every file of a finished checkpoint and mark it as a whole one of `run`, any text that tells runs apart.

    Raises:
        OSError: the disk refused; the checkpoint then counts as unfinished.
    """
    fsync_tree(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    digests = {name: sha256_of(checkpoint / name) for name, size in sizes.items() if size <= SEALED}
    sealed = {"format": FORMAT, "run": run, "sizes": sizes, "sha256": digests}
    atomic_write(checkpoint / COMPLETE, json.dumps(sealed, indent=1))
    fsync_folder(checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """True when `seal` finished and every file still has the size it had then."""
    try:
        sizes = read_seal(checkpoint).sizes
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):  # no seal, or no such file, or a name that no file can have
        return False


def last_whole(folder: Path, run: str | None = None) -> Path | None:
    """The whole checkpoint with the most steps, or None.

    Args:
        run: of a run that is about to go on from it.

    Raises:
        SecateurError: it is not of `run`, when that is given, or holds something else than was written.
    """
    last = max(filter(is_whole, _all(folder)), key=step_of, default=None)
    if last is not None and run is not None:
        _check_seal(last, run)
    return last


def _check_seal(checkpoint: Path, run: str) -> None:
    sealed = read_seal(checkpoint)
    if sealed.run != run:
        raise SecateurError(
            f"{checkpoint / COMPLETE}: of a checkpoint of another run (other settings or other data), expected one of "
            f"this run; take {checkpoint.name} out of the folder"
        )
    if unknown := sorted(sealed.sha256.keys() - sealed.sizes.keys()):
        raise SecateurError(
            f"{checkpoint / COMPLETE}: it has the SHA-256 of {unknown[0]!r:.100} and not its size; put it back as it "
            f"was written, or take {checkpoint} away to go on from the checkpoint before, or anew"
        )
    for name, digest in sealed.sha256.items():
        found = sha256_of(checkpoint / name)
        if found != digest:
            raise SecateurError(
                f"{checkpoint / name}: it was changed since the checkpoint was written (SHA-256 {found}, expected "
                f"{digest} by {COMPLETE}); put it back, or take {checkpoint} away to go on from the checkpoint before, "
                "or anew"
            )


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete checkpoint folders that were never finished; returns what was deleted."""
    removed = [path for path in _all(folder) if not is_whole(path)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    step = checkpoint.name.rpartition("-")[2]
    if not step.isdigit():
        raise SecateurError(f"{checkpoint}: expected a folder named checkpoint-STEP")
    return int(step)


def read_seal(checkpoint: Path) -> Seal:
    """What `seal` wrote.

    Raises:
        SecateurError: it is not there, or damaged.
    """
    path = checkpoint / COMPLETE
    return as_record(read_json(path), Seal, str(path))


@contextlib.contextmanager
def naming_the_last_whole(folder: Path, *, without_any: str = "go on with --resume") -> Iterator[None]:
    """Add to the error of a failed save which checkpoint of `folder` is still whole, and what to do without any."""
    try:
        yield
    except Exception as error:
        unfinished = [path for path in folder.glob("checkpoint-*") if not is_whole(path)]
        if not unfinished or isinstance(error, SecateurError) or launch.has_lost_contact(error):
            raise
        last, refusal = last_whole(folder), refusal_in(error, unfinished[0])
        raise OSError(
            f"{unfinished[0]} could not be written: {refusal_in_words(refusal or error)}. "
            f"The last whole checkpoint is {last.name if last else 'none'}; make room and "
            f"{'go on with --resume' if last else without_any}"
        ) from error


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
