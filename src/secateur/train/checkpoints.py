"""Which checkpoints of a run are whole, and of which run they are.

The Trainer writes a checkpoint file by file. When all files are on the disk, a list of them with their sizes is
renamed into the folder last; a folder without that list, or with a file that differs from it, was never finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, fsync_file, fsync_folder

COMPLETE = "complete.json"
FORMAT = "secateur-checkpoint"


def seal(checkpoint: Path, run: str) -> None:
    """Flush every file of a finished checkpoint and mark it as a whole one of `run`, any text that tells runs apart.

    Raises:
        OSError: the disk refused; the checkpoint then counts as unfinished.
    """
    sizes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE):
        fsync_file(path)
        sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    for folder in {path.parent for path in checkpoint.rglob("*")}:
        fsync_folder(folder)
    atomic_write(checkpoint / COMPLETE, json.dumps({"format": FORMAT, "run": run, "sizes": sizes}, indent=1))
    fsync_folder(checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """True when `seal` finished and every file still has the size it had then."""
    sizes = _read(checkpoint).get("sizes")
    if not isinstance(sizes, dict) or not sizes:
        return False
    try:
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def last_whole(folder: Path, run: str | None = None) -> Path | None:
    """The whole checkpoint with the most steps, or None.

    Raises:
        SecateurError: it is not of `run`, when that is given.
    """
    last = max(filter(is_whole, _all(folder)), key=step_of, default=None)
    if last is not None and run is not None and _read(last).get("run") != run:
        raise SecateurError(
            f"{last}: a checkpoint of another run (other settings or other data), expected one of this run; take it "
            "out of the folder"
        )
    return last


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


def _read(checkpoint: Path) -> dict[str, Any]:
    """The content of the seal; empty when there is none that can be read."""
    try:
        content = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
