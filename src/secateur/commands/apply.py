"""`secateur apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.bars import stage_bars
from secateur.commands.model_options import ExpertsFrom
from secateur.commands.plan_options import Force, Removed
from secateur.commands.shown import show
from secateur.files.bytes_in_words import in_words
from secateur.files.new_folder import IS_THERE


def apply(
    source: Annotated[Path, typer.Argument(help="The folder of a model or of a training checkpoint; it is only read.")],
    plan: Annotated[Path, typer.Argument(help="The plan, a JSON file; or a folder that --undo wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")],
    removed: Removed = None,
    names: Annotated[
        str,
        typer.Option(
            "--names",
            help="What the tensors are called: auto, transformers, torchtitan, or a JSON file (docs/engines.md).",
        ),
    ] = "auto",
    ep: Annotated[
        int,
        typer.Option(
            "--ep", min=1, help="Expert-parallel ranks of the restart: every layer's new count must be a multiple."
        ),
    ] = 1,
    undo: Annotated[
        Path | None,
        typer.Option("--undo", help="Of a model: keep the dropped experts in this new folder, to restore the source."),
    ] = None,
    mtp: Annotated[
        str | None,
        typer.Option(
            "--mtp",
            help="Of a model: what becomes of layers that predict further tokens and that the plan does not name: "
            "whole (they stay as they are, and config.json no longer fits them) or drop.",
        ),
    ] = None,
    experts_from: ExpertsFrom = "config",
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Write a model or a training checkpoint anew with the experts that a plan keeps, in its order.

    A model is a Hugging Face folder: its bytes are copied file by file and never decoded, in as little memory as one
    header takes. Given an undo folder in place of the plan, the model that was pruned is restored byte for byte.

    In a training checkpoint model and optimizer state change together; everything else is copied byte for byte. The
    folder is one of torch.distributed.checkpoint (torchtitan's and transformers' names are known, others are described
    with `--names`) or of transformers' distributed save. Training restarts from the new folder with the new counts.

    Example: `secateur apply models/Qwen3-30B-A3B plan.json --out pruned --undo dropped`
    """
    from secateur.folder_kinds.apply import apply as function

    with stage_bars(show=not (quiet or as_json or dry_run)) as on_progress:
        result = function(
            source,
            plan,
            out,
            removed=removed,  # type: ignore[arg-type]  # another meaning is refused by name, as is another mtp
            names=names,
            ep=ep,
            undo=undo,
            mtp=mtp,  # type: ignore[arg-type]
            experts_from=experts_from,  # type: ignore[arg-type]
            force=force,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    report = result.to_json()
    words = _restored(report, out) if result.plan is None else _summary(report, out, dry_run)
    show(result, words, as_json=as_json, quiet=quiet)


def _restored(restored: dict[str, Any], out: Path) -> str:
    done = f"restored {out}: {len(restored['files'])} files, {in_words(restored['bytes'])} of weights"
    if unchecked := ", ".join(restored["unchecked"]):
        done += f"\nnot checked, as an earlier version wrote the undo folder without their digests: {unchecked}"
    return done


def _summary(report: dict[str, Any], out: Path, dry_run: bool) -> str:
    layers = report["layers"].values()
    before, after = (sum(layer[f"experts_{when}"] for layer in layers) for when in ("before", "after"))
    tensors = sum(part["tensors_changed"] for part in report["checkpoints"])
    size = [in_words(report[f"bytes_{when}"]) for when in ("before", "after")]
    did = "would write" if dry_run else "wrote"
    lines = [
        f"{out} is there already, as this command writes it; nothing was written"
        if IS_THERE in report
        else f"{did} {out}",
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
    left_out = report.get("why_left_out", {})
    for why in dict.fromkeys(left_out.values()):
        lines.append(f"left out, {why}: {', '.join(name for name in left_out if left_out[name] == why)}")
    return "\n".join(lines)
