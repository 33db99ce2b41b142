"""`secateur prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands import data_options
from secateur.commands import plan_options as options
from secateur.commands.bars import stage_bars
from secateur.commands.model_options import ExpertsFrom
from secateur.commands.plan import outcome_lines
from secateur.commands.rule_options import help_for_folders, with_rule_options
from secateur.commands.shown import show
from secateur.commands.verify import WORDS


@with_rule_options(after="protect", help=help_for_folders)
def prune(
    model: Annotated[Path, typer.Argument(help="The folder of a Hugging Face model; it is only read.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")],
    keep: options.KeepOption = None,
    criterion: options.CriterionOption = None,
    removed: options.Removed = None,
    pretrained: options.Pretrained = None,
    data: data_options.Data = None,
    samples: data_options.Samples = None,
    sequence_length: data_options.SequenceLength = None,
    batch_size: data_options.BatchSize = None,
    pack: data_options.Pack = None,
    text_key: data_options.TextKey = None,
    split: data_options.Split = None,
    activations: data_options.Activations = None,
    device: data_options.Device = "auto",
    allocation: options.AllocationOption = "uniform",
    ep: options.ExpertParallel = 1,
    min_experts: options.MinExperts = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of data, and of the criterion random.")] = 0,
    protect: options.Protect = None,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="Keep the dropped experts in this new folder, to restore the source.")
    ] = None,
    mtp: Annotated[
        str | None,
        typer.Option(
            "--mtp",
            help="What becomes of layers that predict further tokens: whole (as they are), drop, or prune (by their "
            "weights, with the others).",
        ),
    ] = None,
    experts_from: ExpertsFrom = "config",
    verify_tokens: Annotated[
        int,
        typer.Option(
            "--verify-tokens", help="Length of the sample that both models are run on at the end; 0 runs neither."
        ),
    ] = 32,
    force: options.Force = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted pruning left.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    **rule: Any,
) -> None:
    """Make a smaller model of a model: observe it on data, plan, apply the plan, verify what was written.

    Without `--criterion` it is reap, which runs the model on text, or a V-MoE on images; without `--data` the text
    is Python's own standard library. aimer, weight_norm, router_row_norm and random need no data. With `--pretrained`
    it is router_norm_change, which needs none either: the experts go whose router rows fine-tuning lengthened least.
    After a kill the same command goes on where it was. The result is checked before it gets its name.

    Example: `secateur prune models/Qwen3-30B-A3B --keep 0.75 --data calibration.jsonl --out pruned`
    """
    from secateur.model_folder.read.collector import collector_at_rest

    with collector_at_rest():
        from secateur.model_folder.prune import prune as function

    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = function(
            model,
            out,
            keep=keep,
            criterion=criterion,
            removed=removed,  # type: ignore[arg-type]  # other values are refused by name
            pretrained=pretrained,
            data=data,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            pack=pack,
            text_key=text_key,
            split=split,
            activations=None if activations is None else activations.value,
            device=device,
            allocation=allocation,  # type: ignore[arg-type]
            ep=ep,
            min_experts=min_experts,
            seed=seed,
            protect=protect,
            undo=undo,
            mtp=mtp,  # type: ignore[arg-type]
            experts_from=experts_from,  # type: ignore[arg-type]
            verify_tokens=verify_tokens,
            force=force,
            restart=restart,
            dry_run=dry_run,
            on_progress=on_progress,
            **rule,
        )
    show(result, "\n".join(_lines(result.to_json(), out, dry_run)), as_json=as_json, quiet=quiet)


def _lines(result: dict[str, Any], out: Path, dry_run: bool) -> list[str]:
    lines = [f"{'would write' if dry_run else 'wrote'} {out}"]
    if result["outcome"] is None:
        return [*lines, "how many experts each layer keeps is decided by the data"]
    lines += outcome_lines(result["outcome"])
    if dry_run and result["report"] is None:
        lines.append("which experts go is decided by the data")
    for check in result.get("verified", {}).get("checks", ()):
        lines.append(f"{WORDS[check['passed']]}: {check['claim']} ({check['detail']})")
    return lines
