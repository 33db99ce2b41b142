"""`secateur report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
) -> None:
    """Write report.html, report.json and the figures of a run again.

    Example: `secateur report run`
    """
    from secateur.reporting.write import write_report

    print(write_report(run))
