"""`secateur apply`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands.bars import bytes_bar
from secateur.commands.plan_options import Removed
from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.training_checkpoint.names import Naming


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
    expert_parallel: Annotated[
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
    from secateur.files.new_folder import check_target
    from secateur.model_folder.rewrite.undo import holds_undo
    from secateur.plans import Plan

    check_target(source, out)
    show = not (quiet or as_json or dry_run)
    if holds_undo(plan):
        if dry_run or undo or mtp or removed or names != "auto" or expert_parallel != 1:
            raise SecateurError(f"{plan}: an undo folder; it restores all of the source and takes no other option")
        _restore(source, plan, out, show=show, as_json=as_json, quiet=quiet)
        return
    write = _writer(source)
    decided = _meaning(Plan.load(plan), removed)
    with bytes_bar("writing", show=show) as on_bytes:
        report = write(
            source,
            decided,
            out,
            names=names,
            undo=undo,
            mtp=mtp,
            expert_parallel=expert_parallel,
            dry_run=dry_run,
            on_bytes=on_bytes,
        )
    if as_json:
        print(json.dumps(report, indent=2))
    elif not quiet:
        print(_summary(report, out, dry_run))


def _meaning(plan: Plan, removed: str | None) -> Plan:
    """The plan with what was asked for, where it leaves that open."""
    if removed is None:
        return plan
    if plan.removed not in (None, removed):
        raise SecateurError(f"--removed {removed}: the plan was made for --removed {plan.removed}")
    return dataclasses.replace(plan, removed=removed)


def _writer(source: Path) -> Callable[..., dict[str, Any]]:
    """What applies a plan to this kind of folder; another kind of folder is another row."""
    from secateur.model_folder.read.collector import collector_at_rest
    from secateur.model_folder.read.tensor_files import holds_model

    with collector_at_rest():
        from secateur.training_checkpoint.apply import holds_training_checkpoint

    writers = ((holds_training_checkpoint, _apply_to_checkpoint), (holds_model, _apply_to_model))
    for holds, write in writers:
        if holds(source):
            return write
    raise SecateurError(
        f"{source}: no training checkpoint in it; expected a .metadata file of torch.distributed.checkpoint, or "
        "shard-*.safetensors files of transformers' distributed save; and no model, expected config.json and "
        "safetensors files"
    )


def _apply_to_checkpoint(
    source: Path, plan: Plan, out: Path, *, names: str, undo: Path | None, mtp: str | None, **options: Any
) -> dict[str, Any]:
    from secateur.training_checkpoint.apply import apply_to_checkpoint

    if undo is not None or mtp is not None:
        raise SecateurError(f"--undo and --mtp: for a model, but {source} is a training checkpoint")
    return apply_to_checkpoint(source, plan, out, naming=_naming(names), **options)


def _apply_to_model(source: Path, plan: Plan, out: Path, *, names: str, **options: Any) -> dict[str, Any]:
    from secateur.model_folder.rewrite.apply import apply_to_model

    if names != "auto":
        raise SecateurError(f"--names {names}: for a training checkpoint, but {source} is a model")
    return apply_to_model(source, plan, out, **options)


def _restore(pruned: Path, undo: Path, out: Path, *, show: bool, as_json: bool, quiet: bool) -> None:
    from secateur.model_folder.rewrite.undo import restore

    with bytes_bar("writing", show=show) as on_bytes:
        restored = restore(pruned, undo, out, on_bytes=on_bytes)
    if as_json:
        print(json.dumps(restored, indent=2))
    elif not quiet:
        print(f"restored {out}: {len(restored['files'])} files, {in_words(restored['bytes'])} of weights")


def _naming(names: str) -> Naming | None:
    from secateur.training_checkpoint.names import NAMINGS
    from secateur.training_checkpoint.names_file import read_naming

    if names == "auto":
        return None
    if names in NAMINGS:
        return NAMINGS[names]
    if not names.endswith(".json"):
        raise SecateurError(f"--names {names}: expected auto, {', '.join(NAMINGS)}, or a .json file")
    return read_naming(Path(names))


def _summary(report: dict[str, Any], out: Path, dry_run: bool) -> str:
    layers = report["layers"].values()
    before, after = (sum(layer[f"experts_{when}"] for layer in layers) for when in ("before", "after"))
    tensors = sum(part["tensors_changed"] for part in report["checkpoints"])
    size = [in_words(report[f"bytes_{when}"]) for when in ("before", "after")]
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
    if left_out := report.get("files_left_out"):
        lines.append(f"left out, weights of the unpruned model in other forms: {', '.join(left_out)}")
    return "\n".join(lines)
