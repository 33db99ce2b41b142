"""Which checkpoints of a run are whole.

The Trainer writes a checkpoint file by file. When all files are on the disk, a list of them with their sizes is
renamed into the folder last; a folder without that list, or with a file that differs from it, was never finished.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from secateur.errors import SecateurError
from secateur.files import atomic_write, fsync_folder

COMPLETE = "complete.json"


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint and mark it as whole.

    Raises:
        OSError: the disk refused; the checkpoint then counts as unfinished.
    """
    sizes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    for folder in {path.parent for path in checkpoint.rglob("*")}:
        fsync_folder(folder)
    atomic_write(checkpoint / COMPLETE, json.dumps({"format": "secateur-checkpoint", "sizes": sizes}, indent=1))
    fsync_folder(checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """True when `seal` finished and every file still has the size it had then."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def last_whole(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, or None."""
    return max(filter(is_whole, _all(folder)), key=step_of, default=None)


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


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
