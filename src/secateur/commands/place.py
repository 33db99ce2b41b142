"""`secateur place`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.bars import stage_bars


def place(
    loads: Annotated[
        Path,
        typer.Argument(
            help="Tokens of each expert: JSON, {layer: [load, ...]}, saved statistics, or a run's loads.jsonl "
            "(its last window)."
        ),
    ],
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Expert-parallel ranks.")],
    method: Annotated[
        str, typer.Option("--method", help="swaps, greedy (LAEP's), or exact (small layers; up to 60 s each).")
    ] = "swaps",
    groups: Annotated[int, typer.Option("--groups", min=1, help="Router groups; experts stay in theirs.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes; they are levelled before their ranks.")] = 1,
    few_moves: Annotated[
        float | None,
        typer.Option(
            "--few-moves", min=0, help="Move few experts only, for at most this share more on the busiest rank: 0.02."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the placement to this file, as JSON.")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Write a plan to this file, for commands that re-order experts.")
    ] = None,
    sglang: Annotated[
        Path | None,
        typer.Option(
            "--sglang",
            help="Write SGLang's --init-expert-location to this file, for the model as it is, not re-ordered.",
        ),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option("--num-layers", min=1, help="With --sglang: layers of the model, where some have no experts."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over these files if they are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the placement as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Place the experts of every layer on expert-parallel ranks, so that all ranks get the same load.

    Rank r owns the r-th block of the new order (`order[new] = old`). Balance is the busiest rank's load over the mean;
    the bound is what no order can go below.

    Example: `secateur place run/loads.jsonl --ranks 8 --few-moves 0.02 --plan plan.json`
    """
    from secateur.placement.every_layer import place as function

    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = function(
            loads,
            ranks,
            method=method,  # type: ignore[arg-type]  # another one is refused by name
            groups=groups,
            nodes=nodes,
            few_moves=few_moves,
            out=out,
            plan=plan,
            sglang=sglang,
            num_layers=num_layers,
            force=force,
            on_progress=on_progress,
        )
    if as_json:
        print(json.dumps(result.to_json()))
    elif not quiet:
        _show(result.to_json())


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    layers = result["layers"]
    table = Table(title=f"Busiest of {result['settings']['ranks']} ranks over the mean")
    for column in ("layer", "experts", "before", "after", "bound", "moved"):
        table.add_column(column, justify="right")
    for name, layer in layers.items():
        numbers = [f"{layer[f'balance_{which}']:.3f}" for which in ("before", "after", "bound")]
        table.add_row(name, str(len(layer["order"])), *numbers, str(layer["moved"]))
    console = Console()
    console.print(table)
    means = [sum(layer[f"balance_{which}"] for layer in layers.values()) / len(layers) for which in ("before", "after")]
    moved = sum(layer["moved"] for layer in layers.values())
    experts = sum(len(layer["order"]) for layer in layers.values())
    console.print(
        f"mean of the layers: {means[0]:.3f} -> {means[1]:.3f}; {moved} of {experts} experts change their rank"
    )
