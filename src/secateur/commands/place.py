"""`secateur place`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write

if TYPE_CHECKING:
    from secateur.placement import Placement
    from secateur.placement.loads import Loads

FORMAT = "secateur-placement"
VERSION = 1


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
    as_json: Annotated[bool, typer.Option("--json", help="Print the placement as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Place the experts of every layer on expert-parallel ranks, so that all ranks get the same load.

    Rank r owns the r-th block of the new order (`order[new] = old`). Balance is the busiest rank's load over the mean;
    the bound is what no order can go below.

    Example: `secateur place run/loads.jsonl --ranks 8 --few-moves 0.02 --plan plan.json`
    """
    import secateur.placement as placement
    from secateur.placement.loads import read_loads
    from secateur.placement.sglang import sglang_location

    if num_layers is not None and sglang is None:
        raise SecateurError("--num-layers says how many rows --sglang writes; it needs --sglang")
    given = read_loads(loads)
    placements = {}
    with _solver_apart():
        for layer, experts in given.items():
            try:
                placements[layer] = placement.place(
                    experts, ranks, method=method, num_groups=groups, num_nodes=nodes, tolerance=few_moves
                )
            except SecateurError as error:
                raise SecateurError(f"{loads}, layer {layer}: {error}") from None
    settings = {"ranks": ranks, "method": method, "groups": groups, "nodes": nodes, "tolerance": few_moves}
    result = _as_json(given, placements, settings)
    if sglang is not None:
        atomic_write(sglang, json.dumps(sglang_location(placements, num_layers)) + "\n")
    if out is not None:
        atomic_write(out, json.dumps(result, indent=1) + "\n")
    if plan is not None:
        _plan(placements, settings).save(plan)
    if as_json:
        print(json.dumps(result))
    elif not quiet:
        _show(result)


def _as_json(loads: Loads, placements: Mapping[int, Placement], settings: Mapping[str, Any]) -> dict[str, Any]:
    from secateur.placement import balance, rank_loads

    ranks = settings["ranks"]
    layers = {
        str(layer): {
            "order": list(placement.order),
            "rank_loads": list(placement.rank_loads),
            "balance_before": balance(rank_loads(loads[layer], range(len(loads[layer])), ranks)),
            "balance_after": placement.balance,
            "balance_bound": placement.lower_bound * ranks / sum(placement.rank_loads),
            "moved": placement.moved,
        }
        for layer, placement in placements.items()
    }
    return {"format": FORMAT, "version": VERSION, "settings": dict(settings), "layers": layers}


def _plan(placements: Mapping[int, Placement], settings: Mapping[str, Any]) -> Any:
    from secateur.plans import LayerPlan, Plan

    layers = {
        layer: LayerPlan(experts_before=len(placement.order), order=placement.order)
        for layer, placement in placements.items()
    }
    return Plan(layers=layers, criterion="placement", details=dict(settings))


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


@contextlib.contextmanager
def _solver_apart() -> Iterator[None]:
    """Send what HiGHS prints on standard output, now and then, to standard error: the output is ours alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
