"""Decide which experts of a model stay, from whatever there is to decide from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from secateur.decide.rules import RuleOptions, check_names, given, spelled_out
from secateur.errors import SecateurError
from secateur.files.given import StrPath, check_given
from secateur.files.new_file import check_new_file
from secateur.files.new_folder import IS_THERE
from secateur.files.progress import OnStage, stage
from secateur.model_folder.choice import choice_of, decide_plan, outcome
from secateur.model_folder.mtp import PRUNE, check_mtp
from secateur.model_folder.source import Source, of_loads, read_source
from secateur.placement.loads import read_loads
from secateur.plans import Plan, plan_at
from secateur.results import Result

LOADS = "loads.jsonl"  # of a training run
Allocation = Literal["uniform", "global", "laep"]


@dataclass(frozen=True, kw_only=True)
class Planned(Result):
    """What `plan` decided; `to_json` also holds what the plan does to the model.

    Args:
        plan: which experts stay. out: its file, or None.
        experts_before, experts_after: {layer: experts}. bytes_before, bytes_after: of all tensors of the model.
        rerouted_share: of the routed tokens, those whose expert goes; None without statistics.
    """

    plan: Plan = field(repr=False)
    out: Path | None
    experts_before: Mapping[int, int]
    experts_after: Mapping[int, int]
    bytes_before: int
    bytes_after: int
    rerouted_share: float | None

    def __fspath__(self) -> str:
        if self.out is None:
            raise TypeError("this plan was not written to a file; give its `plan`, or an `out` when it is made")
        return os.fspath(self.out)

    def table(self) -> Any:
        rows = [(layer, count, self.experts_after[layer]) for layer, count in self.experts_before.items()]
        return ("layer", "experts before", "after"), [*rows, ("bytes", self.bytes_before, self.bytes_after)]


@spelled_out
def plan(
    source: StrPath,
    out: StrPath | None = None,
    *,
    criterion: str | None = None,
    keep: str | float | None = None,
    removed: Literal["reroute", "zero-slot"] | None = None,
    allocation: Allocation = "uniform",
    model: StrPath | None = None,
    pretrained: StrPath | None = None,
    ep: int = 1,
    min_experts: int = 1,
    seed: int = 0,
    protect: bool | None = None,
    mtp: Literal["prune"] | None = None,
    experts_from: Literal["config", "files"] = "config",
    force: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
    **rule: Unpack[RuleOptions],
) -> Planned:
    """Decide which experts stay, and write that down as a plan.

    Statistics serve every criterion: plans for other criteria or numbers cost seconds.

    Args:
        source: statistics that `observe` wrote; the folder of a model or of a LoRA adapter, for criteria without data;
            or a folder that `pretrain` wrote.
        out: a file for the plan, as JSON; without one the plan is in the result only.
        criterion: a name of `secateur.criteria.CRITERIA`, or laep. Without it, reap for statistics, aimer for a model
            without data, router_norm_change for a fine-tuned model with `pretrained`; laep with an option of a rule.
        keep: how many stay: a share of the experts (0.75), a number of each layer (48), as many as fit with the rest of
            the model in so many bytes ("24GB"), or a number for every layer ("0:48,1:40").
        removed: what becomes of a removed expert: reroute (its row of the router goes too, and its tokens go to the
            next experts) or zero-slot (the router stays, and what it sends there contributes nothing).
        allocation: how many of each layer: uniform, global, laep.
        model: the folder of the model that the statistics are of; criteria that read weights need it.
        pretrained: the folder of the model that this one was fine-tuned from.
        ep: expert-parallel ranks to serve on: every layer's count is a multiple.
        min_experts: every layer keeps at least so many. seed: of the criterion random.
        protect: keep super-experts, whatever their score; without it, wherever the statistics show them.
        mtp: prune: also the layers that predict further tokens, by their weights. Without it `apply` is told what
            becomes of them.
        experts_from: what says how many experts a layer has: config (config.json), or files, for a model that a tool
            pruned without updating its config.json.
        force: write over `out` if it is there. dry_run: write nothing.
        on_progress: called with ("reading weights", bytes read, bytes to read), where weights are read.
        rule: for laep, the options of one rule, which also decides how many go; see `Rule`.

    Returns:
        The plan, and what it does to the model. Where `out` holds this plan already it is left as it is, and "is_there"
        is in `to_json()`.

    Raises:
        SecateurError: what is needed is not there, options contradict each other, or the model cannot keep so few.
        OSError: the plan cannot be written.
        TypeError: an option that no rule has.

    Example:
        >>> decided = secateur.plan("stats.safetensors", criterion="reap", keep=0.75)
        >>> decided.plan.layers[0].experts_after
        96
    """
    check_given(plan, locals())
    check_names(rule)
    path, target = Path(source), None if out is None else Path(out)
    whole = None if model is None else Path(model)
    base = None if pretrained is None else Path(pretrained)
    sources, there = list[Path](), None
    if target is not None:
        only_read = (None if (path / LOADS).is_file() else path, whole, base)
        sources = [one for one in only_read if one is not None]
        there = None if force else plan_at(target)
        check_new_file(target, force or there is not None, *sources)
    choice = choice_of(
        criterion or _default(path, has_rule=bool(given(rule)), has_base=base is not None),
        keep=keep,
        rule=rule,
        allocation=allocation,
        ep=ep,
        min_experts=min_experts,
        seed=seed,
        protect=protect,
        removed=removed,
    )
    if mtp not in (None, PRUNE):
        raise SecateurError(f"--mtp {mtp}: expected {PRUNE}; `apply` takes what else can become of such layers")
    read = _read(path, whole, base, experts_from, with_mtp=mtp == PRUNE)
    if mtp == PRUNE:
        check_mtp(read, choice)
    decided = decide_plan(read, choice, on_bytes=stage("reading weights", on_progress))
    is_there = there is not None and there == decided  # the command was killed after its last step, or is given twice
    if target is not None and not is_there:
        check_new_file(target, force, *sources)
        if not dry_run:
            decided.save(target)
    done = outcome(read, decided) | ({IS_THERE: True} if is_there else {})
    return Planned(
        plan=decided,
        out=target,
        experts_before={layer: one.experts_before for layer, one in decided.layers.items()},
        experts_after={layer: one.experts_after for layer, one in decided.layers.items()},
        bytes_before=done["bytes_before"],
        bytes_after=done["bytes_after"],
        rerouted_share=done["rerouted_share"],
        content=done | {"plan": decided.to_json()},
    )


def _read(source: Path, model: Path | None, pretrained: Path | None, experts_from: str, *, with_mtp: bool) -> Source:
    if (source / LOADS).is_file():
        if pretrained is not None:
            raise SecateurError(f"--pretrained {pretrained}: for a fine-tuned model, but {source} is a training run")
        return of_loads(read_loads(source / LOADS), model or source / "model", str(source / LOADS))
    return read_source(source, model, pretrained, experts_from=experts_from, with_mtp=with_mtp)


def _default(source: Path, *, has_rule: bool, has_base: bool) -> str:
    if has_rule or has_base:
        return "laep" if has_rule else "router_norm_change"
    return "aimer" if source.is_dir() and not (source / LOADS).is_file() else "reap"
