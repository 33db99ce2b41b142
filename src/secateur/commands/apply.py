"""`secateur apply`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.surgery.dcp_names import Naming


def apply(
    source: Annotated[Path, typer.Argument(help="The folder of a training checkpoint; it is only read.")],
    plan: Annotated[Path, typer.Argument(help="The plan, a JSON file.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")],
    names: Annotated[
        str,
        typer.Option(
            "--names",
            help="What the tensors are called: auto, transformers, torchtitan, or a JSON file (docs/engines.md).",
        ),
    ] = "auto",
    expert_parallel: Annotated[
        int,
        typer.Option(
            "--ep", min=1, help="Expert-parallel ranks of the restart: every layer's new count must be a multiple."
        ),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Write a training checkpoint anew with the experts that a plan keeps, in its order.

    Model and optimizer state change together; everything else is copied byte for byte. The folder is one of
    torch.distributed.checkpoint (torchtitan's and transformers' names are known, others are described with `--names`)
    or of transformers' distributed save. Training restarts from the new folder with the new counts.

    Example: `secateur apply checkpoint/step-1000 plan.json --out pruned/step-1000`
    """
    from secateur.plan import Plan
    from secateur.surgery.dcp_checkpoint import check_target

    check_target(source, out)
    reader = _reader(source)
    naming = _naming(names)
    decided = Plan.load(plan)
    with _progress(show=not (quiet or as_json or dry_run)) as on_bytes:
        report = reader(
            source, decided, out, naming=naming, expert_parallel=expert_parallel, dry_run=dry_run, on_bytes=on_bytes
        )
    if as_json:
        print(json.dumps(report, indent=2))
    elif not quiet:
        print(_summary(report, out, dry_run))


def _reader(source: Path) -> Callable[..., dict[str, Any]]:
    """What applies a plan to this kind of folder; another kind of folder is another row."""
    from secateur.surgery.dcp_checkpoint import apply_to_checkpoint, holds_training_checkpoint

    readers = ((holds_training_checkpoint, apply_to_checkpoint),)
    for holds, reader in readers:
        if holds(source):
            return reader
    raise SecateurError(
        f"{source}: no training checkpoint in it; expected a .metadata file of torch.distributed.checkpoint, or "
        "shard-*.safetensors files of transformers' distributed save"
    )


def _naming(names: str) -> Naming | None:
    from secateur.surgery.dcp_names import NAMINGS
    from secateur.surgery.dcp_names_file import read_naming

    if names == "auto":
        return None
    if names in NAMINGS:
        return NAMINGS[names]
    if not names.endswith(".json"):
        raise SecateurError(f"--names {names}: expected auto, {', '.join(NAMINGS)}, or a .json file")
    return read_naming(Path(names))


@contextlib.contextmanager
def _progress(*, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while bytes are written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(report: dict[str, Any], out: Path, dry_run: bool) -> str:
    layers = report["layers"].values()
    before, after = (sum(layer[f"experts_{when}"] for layer in layers) for when in ("before", "after"))
    tensors = sum(part["tensors_changed"] for part in report["checkpoints"])
    size = [f"{report[f'bytes_{when}'] / 1e9:.3f} GB" for when in ("before", "after")]
    lines = [
        f"{'would write' if dry_run else 'wrote'} {out}",
        f"experts {before} -> {after} in {len(layers)} layers, {tensors} tensors changed, {size[0]} -> {size[1]}",
    ]
    lines += [
        f"layer {name}: {layer['experts_before']} -> {layer['experts_after']}"
        for name, layer in report["layers"].items()
        if layer["tensors_changed"]
    ]
    lines += [f"{name} edited" for name in report["configs_edited"]]
    lines += [
        f"{name} copied as it is: no expert count of a transformers model in it; give your engine the new counts"
        for name in report["files_copied"]
        if Path(name).name == "config.json"
    ]
    return "\n".join(lines)
