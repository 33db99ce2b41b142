"""Prune a model folder in one go: observe, plan, apply, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from secateur.decide.rules import RuleOptions, check_names, given, spelled_out
from secateur.errors import SecateurError
from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.progress import OnStage
from secateur.model_folder import stages
from secateur.model_folder.checks.check import Check
from secateur.model_folder.choice import choice_of
from secateur.model_folder.measure.data_choice import Activations, DataOptions, device_named
from secateur.model_folder.measure.data_pass import prepare
from secateur.model_folder.plan import Allocation
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.plans import Plan
from secateur.results import Written


@dataclass(frozen=True, kw_only=True)
class Pruned(Written):
    """What `prune` wrote, or in a dry run would write. Where data decide, a dry run knows no plan, and maybe no counts.

    Args:
        out: the new folder. undo: that of the dropped experts, or None.
        plan: which experts stayed; None where a dry run does not know.
        experts_before, experts_after: {layer: experts}; empty where a dry run does not know.
        checks: what was verified; empty in a dry run. A check that fails leaves no result at all.
    """

    undo: Path | None
    plan: Plan | None = field(repr=False)
    experts_before: Mapping[int, int]
    experts_after: Mapping[int, int]
    checks: tuple[Check, ...]

    def table(self) -> Any:
        rows: list[Any] = [
            (f"layer {layer}", f"{count} -> {self.experts_after[layer]} experts")
            for layer, count in self.experts_before.items()
        ]
        rows += [(check.claim, check.detail) for check in self.checks]
        return ("", "value"), [("model", self.out), *rows]


@spelled_out
def prune(
    model: StrPath,
    out: StrPath,
    *,
    keep: str | float | None = None,
    criterion: str | None = None,
    removed: Literal["reroute", "zero-slot"] | None = None,
    pretrained: StrPath | None = None,
    data: StrPaths | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    pack: bool | None = None,
    text_key: str | None = None,
    split: str | None = None,
    activations: Activations | None = None,
    device: str = "auto",
    allocation: Allocation = "uniform",
    ep: int = 1,
    min_experts: int = 1,
    seed: int = 0,
    protect: bool | None = None,
    undo: StrPath | None = None,
    mtp: Literal["whole", "drop", "prune"] | None = None,
    experts_from: Literal["config", "files"] = "config",
    verify_tokens: int = 32,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
    **rule: Unpack[RuleOptions],
) -> Pruned:
    """Make a smaller model of a model: observe it on data, plan, apply the plan, verify what was written.

    After a kill the same call goes on where it was. The result is checked before it gets its name.

    Args:
        model: the folder of a Hugging Face model; it is only read.
        out: the folder to write; it must be new or empty.
        keep: how many experts stay; see `plan`.
        criterion: a name of `secateur.criteria.CRITERIA`, or laep. Without it, reap, which runs the model on data;
            router_norm_change with `pretrained`, and laep with an option of a rule. aimer, weight_norm, random,
            router_row_norm and router_norm_change need no data.
        removed: what becomes of a removed expert; see `plan`.
        pretrained: the folder of the model that this one was fine-tuned from.
        data: text or images that the model is run on; see `observe`, as for the next seven.
        samples: sequences or images. sequence_length: tokens of a sequence. batch_size: that go through together.
        pack: join documents and cut blocks. text_key: where the text is. split: of an hf: dataset.
        activations: where hidden states wait between layers. device: where the model, or its layers, run.
        allocation: how many of each layer: uniform, global, laep.
        ep: expert-parallel ranks to serve on: every layer's count is a multiple.
        min_experts: every layer keeps at least so many.
        seed: of the choice of data, and of the criterion random.
        protect: keep super-experts, whatever their score; without it, wherever the statistics show them.
        undo: a new folder for the dropped experts, to restore the source; see `apply`.
        mtp: what becomes of layers that predict further tokens: whole (as they are), drop, or prune (by their weights,
            with the others).
        experts_from: what says how many experts a layer has: config (config.json), or files, for a model that a tool
            pruned without updating its config.json.
        verify_tokens: length of the sample that both models are run on at the end; 0 runs neither.
        force: replace an earlier result of `apply` or `prune` at `out`, in one step when the new one is complete and
            verified; a folder that holds anything else is refused, and `undo` is never replaced.
        restart: throw away what an interrupted pruning left.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called with ("observing, layer 2 of 24", batches done, batches in all), then with ("reading
            weights" | "writing" | "comparing", bytes done, bytes in all).
        rule: for laep, the options of one rule, which also decides how many go; see `Rule`.

    Returns:
        The plan that was applied, and what was verified.

    Raises:
        SecateurError: the model cannot be pruned like that, a target is not free, or what was written failed a check;
            then nothing is left under their names.
        OSError: the disk refused.
        TypeError: an option that no rule has.

    Example:
        >>> done = secateur.prune("models/Qwen3-30B-A3B", "pruned", keep=0.75, data="calibration.jsonl")
        >>> done.experts_before[0], done.experts_after[0]
        (128, 96)
    """
    check_given(prune, locals())
    check_names(rule)
    choice = choice_of(
        criterion or ("laep" if given(rule) else "reap" if pretrained is None else "router_norm_change"),
        keep=keep,
        rule=rule,
        allocation=allocation,
        ep=ep,
        min_experts=min_experts,
        seed=seed,
        protect=protect,
        removed=removed,
    )
    asked = DataOptions(
        data=as_texts(data),
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        pack=pack,
        text_key=text_key,
        split=split,
        seed=seed,
        activations=activations,
    )
    if asked.data and not choice.needs_data:
        raise SecateurError(f"--data: criterion {choice.criterion!r} needs no data here; leave it out")

    def observe(folder: ModelFolder, stats: Path) -> tuple[dict[str, Any], Callable[[], object]]:
        ready = prepare(folder, asked, stats, device=device_named(device), sums=choice.sums, on_stage=on_progress)
        return ready.data, ready.take

    side = None if undo is None else Path(undo)
    done = stages.run_stages(
        Path(model),
        Path(out),
        choice,
        pretrained=None if pretrained is None else Path(pretrained),
        force=force,
        restart=restart,
        observe=observe,
        undo=side,
        mtp=mtp,
        experts_from=experts_from,
        verify_tokens=verify_tokens,
        dry_run=dry_run,
        on_progress=on_progress,
    )
    layers = {} if done["outcome"] is None else done["outcome"]["layers"]
    checks = done.get("verified", {}).get("checks", ())
    return Pruned(
        out=Path(out),
        undo=side,
        plan=None if done["report"] is None else Plan.from_json(done["report"]["plan"]),
        experts_before={int(layer): counts["experts_before"] for layer, counts in layers.items()},
        experts_after={int(layer): counts["experts_after"] for layer, counts in layers.items()},
        checks=tuple(Check(**check) for check in checks),
        content=done,
    )
