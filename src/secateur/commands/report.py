"""`secateur report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.bars import stage_bars
from secateur.commands.shown import show


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what report.json says.")] = False,
) -> None:
    """Write report.html, report.json and the figures of a run again.

    Example: `secateur report run`
    """
    from secateur.reporting.write import report as function

    with stage_bars(show=not as_json) as on_progress:
        result = function(run, on_progress=on_progress)
    show(result, str(result.page), as_json=as_json, quiet=False)
