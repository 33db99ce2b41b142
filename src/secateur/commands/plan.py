"""`secateur plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands import plan_options as options
from secateur.commands.bars import bytes_bar
from secateur.commands.rule_options import help_for_folders, with_rule_options
from secateur.commands.taken import taken_from
from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.new_file import check_new_file

if TYPE_CHECKING:
    from secateur.model_folder.source import Source

LOADS = "loads.jsonl"  # of a training run
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
    expert_parallel: options.ExpertParallel = 1,
    min_experts: options.MinExperts = 1,
    seed: options.Seed = 0,
    protect: options.Protect = None,
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
        from secateur.model_folder.choice import decide_plan, outcome

    if out is None and not dry_run:
        raise SecateurError("--out names the file for the plan; it is missing (or use --dry-run)")
    if out is not None:
        only_read = (None if (source / LOADS).is_file() else source, model, pretrained)
        check_new_file(out, force, *(path for path in only_read if path is not None))
    typed = taken_from(locals(), options.ChoiceOptions)
    asked = typed.choice(criterion or _default(source, has_rule=typed.has_rule, has_base=pretrained is not None))
    given = _read(source, model, pretrained)
    with bytes_bar("reading weights", show=not (quiet or as_json)) as on_bytes:
        decided = decide_plan(given, asked, on_bytes=on_bytes)
    if out is not None and not dry_run:
        decided.save(out)
    result = outcome(given, decided)
    if as_json:
        print(json.dumps(result | {"plan": decided.to_json()}, indent=2))
    elif not quiet:
        print("\n".join([f"{'would write' if dry_run else 'wrote'} {out or 'a plan'}", *outcome_lines(result)]))


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


def _read(source: Path, model: Path | None, pretrained: Path | None) -> Source:
    from secateur.model_folder.source import of_loads, read_source
    from secateur.placement.loads import read_loads

    if (source / LOADS).is_file():
        if pretrained is not None:
            raise SecateurError(f"--pretrained {pretrained}: for a fine-tuned model, but {source} is a training run")
        return of_loads(read_loads(source / LOADS), model or source / "model")
    return read_source(source, model, pretrained)


def _default(source: Path, *, has_rule: bool, has_base: bool) -> str:
    if has_rule or has_base:
        return "laep" if has_rule else "router_norm_change"
    return "aimer" if source.is_dir() and not (source / LOADS).is_file() else "reap"


def _by_layer(found: dict[str, list[int]]) -> str:
    return "; ".join(f"layer {layer}: {' '.join(map(str, ids))}" for layer, ids in found.items()) or "none"
