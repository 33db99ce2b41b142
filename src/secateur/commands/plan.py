"""`secateur plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands import plan_options as options
from secateur.commands.bars import stage_bars
from secateur.commands.model_options import ExpertsFrom
from secateur.commands.rule_options import help_for_folders, with_rule_options
from secateur.commands.shown import show
from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.new_folder import IS_THERE

LISTED = 12  # layers in a message


@with_rule_options(after="protect", help=help_for_folders)
def plan(
    source: Annotated[
        Path,
        typer.Argument(
            help="Statistics that `secateur observe` wrote; the folder of a model or of a LoRA adapter, for criteria "
            "without data; or a folder that `secateur pretrain` wrote."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan to this file, as JSON.")] = None,
    criterion: options.CriterionOption = None,
    keep: options.KeepOption = None,
    removed: options.Removed = None,
    allocation: options.AllocationOption = "uniform",
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The model that the statistics are of; criteria that read weights need it."),
    ] = None,
    pretrained: options.Pretrained = None,
    ep: options.ExpertParallel = 1,
    min_experts: options.MinExperts = 1,
    seed: options.Seed = 0,
    protect: options.Protect = None,
    mtp: Annotated[
        str | None,
        typer.Option(
            "--mtp",
            help="prune: also the layers that predict further tokens, by their weights. Left out: `apply` is told what "
            "becomes of them.",
        ),
    ] = None,
    experts_from: ExpertsFrom = "config",
    force: Annotated[bool, typer.Option("--force", help="Write over --out if it is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the plan would do; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and what it does as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    **rule: Any,
) -> None:
    """Decide which experts stay, and write that down as a plan.

    Without `--criterion` it is reap for statistics, aimer for a model without data, and router_norm_change for a
    fine-tuned model with `--pretrained`; with an option of laep it is laep. Statistics serve every criterion: plans
    for other criteria or numbers cost seconds.

    Example: `secateur plan stats.safetensors --criterion reap --keep 0.75 --out plan.json`
    """
    from secateur.model_folder.read.collector import collector_at_rest

    with collector_at_rest():
        from secateur.model_folder.plan import plan as function

    if out is None and not dry_run:  # from Python, the plan is in the result
        raise SecateurError("--out names the file for the plan; it is missing (or use --dry-run)")
    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = function(
            source,
            out,
            criterion=criterion,
            keep=keep,
            removed=removed,  # type: ignore[arg-type]  # another meaning is refused by name, as is another allocation
            allocation=allocation,  # type: ignore[arg-type]
            model=model,
            pretrained=pretrained,
            ep=ep,
            min_experts=min_experts,
            seed=seed,
            protect=protect,
            mtp=mtp,  # type: ignore[arg-type]
            experts_from=experts_from,  # type: ignore[arg-type]
            force=force,
            dry_run=dry_run,
            on_progress=on_progress,
            **rule,
        )
    did = "would write" if dry_run else "wrote"
    is_there = IS_THERE in result.to_json()
    first = f"{out} holds this plan already; nothing was written" if is_there else f"{did} {out or 'a plan'}"
    lines = [first, *outcome_lines(result.to_json())]
    show(result, "\n".join(lines), as_json=as_json, quiet=quiet)


def outcome_lines(result: dict[str, Any]) -> list[str]:
    """What a plan does to a model, in words; see `decide.outcome`."""
    from secateur.model_folder.rewrite.card import LOADS_EVERYWHERE, who_loads

    layers = {name: (counts["experts_before"], counts["experts_after"]) for name, counts in result["layers"].items()}
    size = [in_words(result[f"bytes_{when}"]) for when in ("before", "after")]
    lines = [
        f"{result['criterion']}: experts {result['experts_before']} -> {result['experts_after']} in {len(layers)} "
        f"layers, {size[0]} -> {size[1]}"
    ]
    if len(set(layers.values())) == 1:
        before, after = next(iter(layers.values()))
        lines.append(f"every layer: {before} -> {after}")
    else:
        lines += [f"layer {name}: {before} -> {after}" for name, (before, after) in [*layers.items()][:LISTED]]
        lines += [f"... and {len(layers) - LISTED} more layers"] if len(layers) > LISTED else []
    if result["rerouted_share"] is not None:
        lines.append(f"{100 * result['rerouted_share']:.2f} % of the routed tokens lose their expert")
    if result["super_experts"] is not None:
        protected, rescued = (_by_layer(result["super_experts"][key]) for key in ("protected", "rescued"))
        lines.append(f"super-experts protected: {protected}; of these the criterion would have dropped: {rescued}")
    if result["never_routed"]:
        lines.append(f"never routed to: {result['never_routed']} experts, {result['never_routed_dropped']} of them go")
    note = who_loads({after for _, after in layers.values()}, result["removed"])
    return lines if note == LOADS_EVERYWHERE else [*lines, note]


def _by_layer(found: dict[str, list[int]]) -> str:
    return "; ".join(f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in found.items()) or "none"
