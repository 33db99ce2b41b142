"""`secateur phases`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.commands.bars import stage_bars

if TYPE_CHECKING:
    from secateur.replay.phases import Phases


def phases(
    run: Annotated[
        Path,
        typer.Argument(
            help="The folder of a run, pruned or not, or a file of JSON lines: "
            '{"step": 20, "tokens": 40960, "layers": {"0": [tokens of each expert]}} a window; "learning_rate" if '
            "it is known."
        ),
    ],
    max_regret: Annotated[
        float,
        typer.Option(
            "--max-regret",
            help="Loads are stable when the idlest experts of now are expected to carry at most this share of the "
            "tokens more than the idlest ones at the end of the run.",
        ),
    ] = 0.025,
    max_noise: Annotated[
        float, typer.Option("--max-noise", help="And when sampling alone makes at most this share.")
    ] = 0.005,
    min_change: Annotated[
        float,
        typer.Option(
            "--min-change",
            help="And when at least this share of the tokens goes to other experts than in the first window; 0 for a "
            "model that was trained before.",
        ),
    ] = 0.1,
    min_windows: Annotated[int, typer.Option("--min-windows", help="And not before so many windows.")] = 16,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Of the whole run, where the record does not say it. Default: the last."),
    ] = None,
    warmup_steps: Annotated[
        int, typer.Option("--warmup-steps", min=0, help="Nothing is stable before; for records without learning rates.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the phases, window by window, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Replay the loads of a run: when would LAEP have found them stable, and why not earlier?

    Example: `secateur phases run --max-regret 0.02`
    """
    import json

    from secateur.replay.phases import phases as function

    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = function(
            run,
            max_regret=max_regret,
            max_noise=max_noise,
            min_change=min_change,
            min_windows=min_windows,
            steps=steps,
            warmup_steps=warmup_steps,
            on_progress=on_progress,
        )
    if as_json:
        print(json.dumps(result.to_json()))
    elif not quiet:
        _show(result)


def _show(result: Phases) -> None:
    from rich.console import Console
    from rich.table import Table

    from secateur.replay.phases import why

    head, rows = result.table()
    table = Table()
    for column in head:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        table.add_row(
            *("" if cell is None else f"{cell:.2e}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    console = Console()
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(why(result), soft_wrap=True, highlight=False)
