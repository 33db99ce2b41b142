"""Is a result there already, as the same command would write it?

Then the command was killed after its last step, or is given twice, and has nothing left to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.files.json import read_json
from secateur.files.new_folder import check_apart, occupied
from secateur.model_folder.rewrite.report import REPORT
from secateur.model_folder.rewrite.side_files import PLAN
from secateur.model_folder.rewrite.target import Comparison, DifferentError, Target


def holds_result(out: Path) -> bool:
    """Whether it may be a result of `apply`."""
    return not out.is_symlink() and (out / REPORT).is_file()


def check_is_there(
    source: Path,
    out: Path,
    undo: Path | None,
    report: Mapping[str, Any],
    fill: Callable[[Target, Path, Path | None], None],
) -> None:
    """Compare two folders with what would be written: first by the report, which says of what, by which plan and how.

    Args:
        fill: gives a target all files of (out, undo).

    Raises:
        SecateurError: they are another result, or something else.
    """
    check_apart(source, out)
    if undo is not None:
        check_apart(source, undo, "--undo")
    found = Comparison()
    try:
        if read_json(out / REPORT) != json.loads(json.dumps(report)):
            raise DifferentError(f"{REPORT} in it is of another source, another plan or other options")
        fill(found, out, undo)
        for folder in (out, *([] if undo is None else [undo])):
            found.check_nothing_else(folder, PLAN)
    except DifferentError as why:
        raise occupied(out, why) from why
