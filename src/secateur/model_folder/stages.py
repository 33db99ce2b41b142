"""All stages in one: observe where the criterion needs data, plan, apply, verify. A start after a kill goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_object
from secateur.files.kept import Kept
from secateur.files.new_folder import check_target, copy_file, is_occupied, remove_leftovers, roll_back
from secateur.files.progress import OnStage, stage
from secateur.files.records import as_record
from secateur.files.work_folder import Work, as_noted, differing, place_of_work, work_folder
from secateur.model_folder.checks.claims import as_json, check_tokens, read_verified, verify_model
from secateur.model_folder.choice import Choice, check_choice, decide_plan, outcome, who_needs_data
from secateur.model_folder.mtp import PRUNE, check_mtp
from secateur.model_folder.read.model_folder import BY_CONFIG, ModelFolder
from secateur.model_folder.read.tensor_files import STATS
from secateur.model_folder.rewrite.apply import MTP_CHOICES, apply_to_model, check_target_pair
from secateur.model_folder.rewrite.replace import check_out
from secateur.model_folder.rewrite.report import REPORT, VERIFIED, read_applied
from secateur.model_folder.rewrite.undo import holds_undo, read_record
from secateur.model_folder.source import Source, of_folder, of_observation
from secateur.observation.observation import Observation
from secateur.plans import ZERO_SLOT, LayerPlan, Plan

# (model, statistics file to write) -> (what the model is run on, as JSON; what does it, on from where a killed one was)
Observe = Callable[[ModelFolder, Path], tuple[Mapping[str, Any], Callable[[], object]]]
KEPT_STATS, KEPT_PLAN = "stats.safetensors", "plan.json"  # in the work folder


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides the result."""

    model: dict[str, Any]
    pretrained: dict[str, Any] | None
    data: dict[str, Any] | None
    choice: dict[str, Any]
    undo: str | None
    mtp: str | None
    replaces: int | None = None  # number of the folder at `out` that the result will replace
    kept: dict[str, str] = {}  # SHA-256 of the files in the work folder that were finished since


def run_stages(
    model: Path,
    out: Path,
    choice: Choice,
    *,
    pretrained: Path | None = None,
    observe: Observe | None = None,
    undo: Path | None = None,
    mtp: str | None = None,
    experts_from: str = BY_CONFIG,
    verify_tokens: int = 32,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
) -> dict[str, Any]:
    """Prune a model folder into the new folder `out`.

    What is finished lies in a hidden folder beside `out` until all is; a start with the same data goes on from there,
    also with another criterion or another number of experts, since the statistics serve them all. Where they lack a
    sum that the criterion reads, the model is observed again.

    Args:
        pretrained: the folder of the model that this one was fine-tuned from, where `choice` compares the two.
        observe: prepares the pass over data, where `choice` needs one.
        undo, mtp, experts_from: see `apply_to_model`. verify_tokens: see `verify_model`.
        force: replace an earlier result at `out`, see `check_out`.
        restart: begin anew, whatever an interrupted pruning left.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called with ("reading weights" | "writing" | "comparing", bytes done, bytes in all), and as by
            `verify_model`.

    Returns:
        {"outcome": see `decide.outcome`, "verified": see `verify.as_json`, "report": see `apply_to_model`}; of a dry
        run without "verified", and where data would decide, only the "outcome" as far as it is known, or None.

    Raises:
        SecateurError: the model cannot be pruned like that, `out` or `undo` is not free, or what was written failed
            a check; then nothing is left under their names.
        OSError: the disk refused.
    """
    check_tokens(verify_tokens)
    if mtp not in (None, *MTP_CHOICES, PRUNE):
        raise SecateurError(f"--mtp {mtp}: expected {', '.join(MTP_CHOICES)} or {PRUNE}")
    source = of_folder(model, pretrained, experts_from=experts_from, with_mtp=mtp == PRUNE)
    found = source.found
    if found is None:
        raise SecateurError(
            f"{model}: a LoRA adapter; merge it into its model (PEFT does) and prune the merged model, or "
            f"apply to that a plan of `secateur plan {model} --pretrained ...`"
        )
    if choice.needs_data and observe is None:
        raise SecateurError(f"{who_needs_data(choice)} needs data to run the model on")
    if found.mtp_counts and mtp is None:
        raise SecateurError(
            f"layers {sorted(found.mtp_counts)} predict further tokens (MTP) and are not pruned with the others: say "
            "what becomes of them with --mtp whole, --mtp drop, or --mtp prune where their weights can decide"
        )
    if mtp == "drop":
        mtp_bytes = sum(found.files.tensors[name].length for name in found.mtp)
        source = dataclasses.replace(source, left_out_bytes=mtp_bytes)
    asked_of_mtp = mtp
    if mtp == PRUNE:
        check_mtp(source, choice)
        mtp = None
    counts = check_choice(source, choice)
    place = place_of_work(out)
    if dry_run or not place.is_dir():
        _check_targets(model, out, undo, force)
        stand_in = counts or _without_one_expert(found, choice)
        multiple = 1 if counts is None else choice.multiple_of
        apply_to_model(model, stand_in, out, expert_parallel=multiple, undo=undo, mtp=mtp, experts_from=experts_from,
                       force=force, dry_run=True)  # fmt: skip
    if dry_run:
        if choice.needs_data and observe is not None:
            observe(found, place / KEPT_STATS)
        return _foreseen(source, choice, counts, out, undo, mtp, experts_from, force, on_progress)
    refusal = f"--out {out}: another process is pruning into it (it holds {place})"
    with work_folder(place, Asked, refusal, restart=restart) as work:
        stats = work.path / KEPT_STATS  # once they are finished; an unfinished pass keeps what it has beside them
        data, take = observe(found, stats) if choice.needs_data and observe is not None else (None, None)
        asked = _asked(source, choice, data, undo, asked_of_mtp, _number(out) if force else None)
        kept = Kept(work, work.before.kept if work.before else {})
        if _is_finished(work.before, asked, out):  # killed after the last step
            if undo is not None:
                roll_back(out, undo)  # both have their names, so it only takes away the note of that
            remove_leftovers(out)  # what `out` has replaced
            work.remove()
            return _finished(out, source)
        _check_same(work, asked)
        _remove_unfinished_undo(work, kept, asked, undo, out)
        _check_targets(model, out, undo, force)
        # of statistics that this start may not need, and the next one may
        before = work.before and work.before.data
        kept.note(msgspec.structs.asdict(asked) | {"data": asked.data or before})
        if take is not None:
            # statistics without a digest are of a process that was killed when they had just got their name
            observed = Observation.load(stats) if kept.has(KEPT_STATS) else None
            # a start with another criterion may have recorded fewer sums
            if observed is None or set(choice.sums) - set(observed.stats.sums):
                kept.forget(KEPT_STATS)
                take()
                kept.add(KEPT_STATS)
                observed = Observation.load(stats)
            seen = of_observation(observed, found, str(stats))
            source = dataclasses.replace(seen, left_out_bytes=source.left_out_bytes)
        try:
            plan = decide_plan(source, choice, on_bytes=stage("reading weights", on_progress))
        except SecateurError:
            if work.before is None and take is None:
                work.remove()  # a first start that was refused leaves nothing to go on from
            raise
        kept.forget(KEPT_PLAN)
        plan.save(work.path / KEPT_PLAN)
        kept.add(KEPT_PLAN)

        def finish(written: Path) -> None:
            if take is not None:
                copy_file(stats, written / STATS)
                kept.check(KEPT_STATS, written / STATS)
            _verify(model, written, out, verify_tokens, on_progress)
            found.files.check_unchanged()  # since the start, of which the data were read

        apply_to_model(
            model,
            plan,
            out,
            expert_parallel=choice.multiple_of,
            undo=undo,
            mtp=mtp,
            experts_from=experts_from,
            force=force,
            on_bytes=stage("writing", on_progress),
            finish=finish,
        )
        work.remove()
    return _finished(out, source)


def _check_targets(model: Path, out: Path, undo: Path | None, force: bool) -> None:
    check_out(model, out, force=force)
    if undo is not None:
        check_target(model, undo, "--undo")
        check_target_pair(out, undo)


def _foreseen(
    source: Source,
    choice: Choice,
    counts: Plan | None,
    out: Path,
    undo: Path | None,
    mtp: str | None,
    experts_from: str,
    force: bool,
    on_progress: OnStage | None,
) -> dict[str, Any]:
    """Of a dry run: everything where no data decide, else what is known without them."""
    if choice.needs_data:
        known = None if counts is None else outcome(source, counts) | {"criterion": choice.criterion}
        return {"outcome": known, "report": None}
    assert source.found is not None
    plan = decide_plan(source, choice, on_bytes=stage("reading weights", on_progress))
    report = apply_to_model(source.found.files.path, plan, out, expert_parallel=choice.multiple_of, undo=undo, mtp=mtp,
                            experts_from=experts_from, force=force, dry_run=True)  # fmt: skip
    return {"outcome": outcome(source, plan), "report": report}


def _verify(model: Path, written: Path, out: Path, num_tokens: int, on_progress: OnStage | None) -> None:
    """Leave the checks in the folder, which will be `out`; refuse it where one failed."""
    checks = verify_model(
        model,
        written,
        num_tokens=num_tokens,
        on_progress=on_progress,
    )
    failed = [f"{check.claim} ({check.detail})" for check in checks if check.passed is False]
    if failed:
        raise SecateurError(f"what was written failed: {'; '.join(failed)}; nothing was left at {out}")
    atomic_write(written / VERIFIED, json.dumps(as_json(model, out, checks), indent=2) + "\n")


def _finished(out: Path, source: Source) -> dict[str, Any]:
    plan, _ = read_applied(out / REPORT)
    if source.stats is None and (out / STATS).is_file():
        source = dataclasses.replace(source, stats=Observation.load(out / STATS).stats)
    return {
        "outcome": outcome(source, plan),
        "verified": read_verified(out / VERIFIED),
        "report": read_object(out / REPORT),
    }


def _without_one_expert(folder: ModelFolder, choice: Choice) -> Plan:
    """Stands in for a plan whose counts data will decide: the least that can be removed, if anything can.

    Zero slots need a class of their own, so it has to remove something to show whether the model can have them. Cut
    rows need none, and which counts a router takes is the plan's own affair.
    """
    kept = folder.counts
    if choice.removed == ZERO_SLOT:
        kept = {layer: max(1, count - 1) for layer, count in kept.items()}
    layers = {
        layer: LayerPlan(experts_before=count, order=tuple(range(kept[layer])))
        for layer, count in folder.counts.items()
    }
    return Plan(layers=layers, criterion=choice.criterion, removed=choice.removed)


def _check_same(work: Work[Asked], asked: Asked) -> None:
    for key in ("model", "pretrained", "data"):
        before, now = getattr(work.before, key, None), getattr(asked, key)
        if before is None or now is None or before == now:
            continue
        name = differing(before, now)[0]
        raise SecateurError(
            f"{work.path}: an unfinished pruning with another {'--data' if key == 'data' else key} ({name} was "
            f"{before.get(name)!r:.200}, is {now.get(name)!r:.200}); give what was given then, or begin anew with "
            "--restart"
        )


def _remove_unfinished_undo(work: Work[Asked], kept: Kept, asked: Asked, undo: Path | None, out: Path) -> None:
    """Of a start that was killed after the undo folder got its name and before the result did."""
    if undo is None or work.before is None or _number(out) != work.before.replaces or work.before.undo != asked.undo:
        return
    if holds_undo(undo) and kept.has(KEPT_PLAN):
        _, written = read_record(undo)
        if written == Plan.load(work.path / KEPT_PLAN):
            shutil.rmtree(undo)


def _number(folder: Path) -> int | None:
    """What tells a folder with something in it from another one that takes its name; None of a free name."""
    return folder.stat().st_ino if is_occupied(folder) else None


def _is_finished(before: Asked | None, asked: Asked, out: Path) -> bool:
    """Whether `out` is the result of an earlier start that was asked for the same, and not what that was to replace."""
    if before is None or not (out / VERIFIED).is_file() or _number(out) == before.replaces:
        return False
    return before == msgspec.structs.replace(asked, replaces=before.replaces, kept=before.kept)


def _asked(
    source: Source,
    choice: Choice,
    data: Mapping[str, Any] | None,
    undo: Path | None,
    mtp: str | None,
    replaces: int | None,
) -> Asked:
    assert source.found is not None
    asked = {
        "model": source.found.files.state,
        "pretrained": None if source.pretrained is None else source.pretrained.files.state,
        "data": data,
        "choice": dataclasses.asdict(choice),
        "undo": None if undo is None else str(undo.resolve()),
        "mtp": mtp,
        "replaces": replaces,
    }
    return as_record(as_noted(asked), Asked, "what is asked")
