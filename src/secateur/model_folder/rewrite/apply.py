"""Apply a plan to a Hugging Face model folder, into a new folder: all of it, or nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from secateur import modeling_secateur
from secateur.errors import SecateurError
from secateur.files.atomic import flushed_meanwhile
from secateur.files.new_folder import IS_THERE, check_target, is_occupied, roll_back, written_beside, written_together
from secateur.files.progress import OnChunk, OnProgress, counted, silent
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import BY_CONFIG, ModelFolder, read_model_folder
from secateur.model_folder.read.tensor_files import CONFIG, INDEX, TensorFiles
from secateur.model_folder.rewrite.already import check_is_there, holds_result
from secateur.model_folder.rewrite.card import card
from secateur.model_folder.rewrite.compare import verify_written
from secateur.model_folder.rewrite.config_json import edited_config
from secateur.model_folder.rewrite.pieces import dropped_tensors, kept_tensors
from secateur.model_folder.rewrite.replace import check_out
from secateur.model_folder.rewrite.report import REPORT, describe, page
from secateur.model_folder.rewrite.side_files import CARD, CODE, PAGE, PLAN, side_files
from secateur.model_folder.rewrite.target import Target
from secateur.model_folder.rewrite.undo import write_undo
from secateur.model_folder.rewrite.writer import Shard, file_metadata, index_of, into_shards
from secateur.model_folder.rewrite.zero_slots import check_buildable, check_removal
from secateur.plans import JSON, Plan
from secateur.surgery.config_json import is_pruned, loading_lines
from secateur.surgery.fits import check_multiple, check_plan_fits

MTP_CHOICES = ("whole", "drop")
ENDS = 4096  # bytes compared at either end of every copied piece; `secateur verify` compares all


def apply_to_model(
    source: Path,
    plan: Plan,
    out: Path,
    *,
    expert_parallel: int = 1,
    undo: Path | None = None,
    mtp: str | None = None,
    experts_from: str = BY_CONFIG,
    force: bool = False,
    dry_run: bool = False,
    on_bytes: OnProgress = silent,
    finish: Callable[[Path], None] = lambda written: None,
) -> dict[str, JSON]:
    """Write `source` with the experts that `plan` keeps, in its order, to the new folder `out`.

    Kept bytes are copied and never decoded; memory does not grow with the model. The result is written beside `out`,
    read again and compared with the source at the ends of every piece, and renamed.

    Args:
        expert_parallel: every layer's new count must be a multiple of it.
        undo: a new folder for all that the result lacks; `undo.restore` makes the source of both, byte for byte.
        mtp: what becomes of multi-token-prediction layers that the plan does not name: "whole" or "drop". Without it
            they must end up with the count that config.json gives.
        experts_from: what says how many experts a layer has, see `understand`; config.json of the result is right.
        force: replace an earlier result at `out`, see `check_out`; never an undo folder, which may be the only copy.
        dry_run: check and report, write nothing.
        on_bytes: called with (bytes written, bytes to write).
        finish: called with the complete folder before it gets its name; what it raises undoes everything.

    Returns:
        The report, which is also written as report.json. Where `out` and `undo` are there already, byte for byte as
        they would be written, nothing is written, and it also has IS_THERE.

    Raises:
        SecateurError: the source is damaged or is no such model, or was changed meanwhile; the plan does not fit, `out`
            or `undo` is not free.
        OSError: the disk refused; nothing is left under the names of `out` and `undo`.
    """
    if undo is not None and not dry_run:
        roll_back(out, undo)
    may_be_there = not (force or dry_run) and holds_result(out) and (undo is None or is_occupied(undo))
    replaces = not may_be_there and _check_targets(source, out, undo, force=force)
    folder = read_model_folder(source, experts_from)
    _check_plan(folder, plan, expert_parallel, mtp)
    filled = plan.filled(folder.all_counts)  # lists every layer; what is saved is the plan that was given
    check_multiple({layer: filled.layers[layer].experts_after for layer in folder.counts}, expert_parallel)
    left_out = folder.mtp if mtp == "drop" else frozenset()
    config = edited_config(folder, filled, mtp)
    if plan.leaves_zero_slots:
        check_buildable(folder, config)
    kept = kept_tensors(folder, filled, left_out)
    beside_weights = side_files(folder, filled)
    report = describe(folder, plan, filled, kept, mtp, beside_weights)
    if experts_from != BY_CONFIG:
        report["experts_from"] = experts_from
    history = history_of(source, plan)
    if dry_run:
        return report
    dropped = [] if undo is None else dropped_tensors(folder, filled, left_out)
    limit = None if folder.files.index is None else _largest_file(folder.files)
    shards = into_shards(kept, limit)
    on_chunk = counted(sum(tensor.length for tensor in (*kept, *dropped)), on_bytes)

    def fill(target: Target, beside: Path, side: Path | None) -> None:
        # the small files first: once there is much to write, each would wait for all of it
        if limit is not None:
            metadata = index_metadata(folder.files, sum(tensor.length for tensor in kept))
            target.text(beside / INDEX, index_of(shards, metadata))
        for relative in beside_weights.copied:
            target.copy(source / relative, beside / relative)
        for relative, content in beside_weights.rewritten.items():
            target.text(beside / relative, content)
        target.text(beside / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if is_pruned(config):
            target.text(beside / CODE, Path(modeling_secateur.__file__).read_text(encoding="utf-8"))
        target.plan(beside / PLAN, history)
        original = source / CARD
        text = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else None
        target.text(beside / CARD, card(report, text, loading_lines(config)))
        target.text(beside / PAGE, page(report))
        target.text(beside / REPORT, json.dumps(report, indent=2) + "\n")
        write_weights(folder.files, shards, beside, on_chunk, target)
        if side is not None:
            write_undo(folder.files, plan, mtp, into_shards(dropped, _largest_file(folder.files), stem="dropped"), side,
                       beside_weights.copied, on_chunk, target)  # fmt: skip

    if may_be_there:
        check_is_there(source, out, undo, report, fill)
        folder.files.check_unchanged()
        return report | {IS_THERE: True}
    with _written(out, undo, replaces) as (beside, side):
        with flushed_meanwhile() as flush:
            fill(Target(flush), beside, side)
        verify_written(folder, read_model_folder(beside), filled, left_out, ENDS)
        finish(beside)
        if replaces:
            check_out(source, out, force=True)  # nobody has put anything else there meanwhile
        folder.files.check_unchanged()
    return report


def history_of(source: Path, plan: Plan) -> Plan:
    """What was done to the model so far, this plan included."""
    earlier = source / PLAN
    if not earlier.is_file():
        return plan
    try:
        return Plan.load(earlier).compose(plan)
    except SecateurError as error:
        raise SecateurError(f"{earlier}: expected the plan that made this model ({error}); take it away") from error


def check_target_pair(out: Path, undo: Path) -> None:
    """Refuse two targets that are the same or inside each other."""
    here, there = out.resolve(), undo.resolve()
    if here == there or there.is_relative_to(here) or here.is_relative_to(there):
        raise SecateurError(f"--undo {undo}: it and --out {out} are the same or inside each other")


def write_weights(folder: TensorFiles, shards: list[Shard], beside: Path, on_chunk: OnChunk, target: Target) -> None:
    """Write files whose bytes come from the files of `folder`."""
    metadata = file_metadata(folder)
    for shard in shards:
        target.shard(shard, lambda file: folder.path / file, beside / shard.file, metadata, on_chunk)


def _check_targets(source: Path, out: Path, undo: Path | None, *, force: bool) -> bool:
    """Whether `out` holds a result to replace; raises SecateurError where a target is not free."""
    replaces = check_out(source, out, force=force)
    if undo is not None:
        check_target(source, undo, "--undo")
        check_target_pair(out, undo)
    return replaces


def _check_plan(folder: ModelFolder, plan: Plan, expert_parallel: int, mtp: str | None) -> None:
    if mtp is not None and mtp not in MTP_CHOICES:
        raise SecateurError(f"--mtp {mtp}: expected {' or '.join(MTP_CHOICES)}")
    named = sorted(folder.mtp_counts.keys() & plan.layers.keys())
    if mtp is not None and named:
        raise SecateurError(f"--mtp {mtp}: the plan names the layers {named} itself; expected one of the two")
    model = folder.config
    _check_model(folder, plan)
    check_removal(folder, plan, expert_parallel=expert_parallel)
    check_plan_fits(plan, folder.all_counts, min_experts=model.min_experts, num_groups=model.num_groups)


def _check_model(folder: ModelFolder, plan: Plan) -> None:
    """Compare the model that a plan was made for with the one at hand, where the plan tells."""
    steps = plan.details.get("steps")
    first: Any = steps[0].get("details") if isinstance(steps, list) and steps and isinstance(steps[0], dict) else None
    told: Any = (first if isinstance(first, dict) else plan.details).get("model")
    here = model_facts(folder)
    if isinstance(told, dict) and told.get("digest") != here.digest:
        raise SecateurError(
            f"plan: it was made for a {told.get('model_type')} model with other layers or routers "
            f"than those of {folder.files.path}, by its config.json a {here.model_type}"
        )


def _largest_file(folder: TensorFiles) -> int:
    """Bytes of tensors in the largest file."""
    sizes = dict.fromkeys(folder.headers, 0)
    for tensor in folder.tensors.values():
        sizes[tensor.file] += tensor.length
    return max(sizes.values())


def index_metadata(folder: TensorFiles, num_bytes: int) -> dict[str, Any]:
    """That of the source's index, with the new number of bytes."""
    found = folder.index.get("metadata") if folder.index is not None else None
    metadata = dict(found) if isinstance(found, dict) else {}
    metadata.pop("total_parameters", None)  # nobody can count parameters packed into bytes; no reader asks
    return metadata | {"total_size": num_bytes}


@contextlib.contextmanager
def _written(out: Path, undo: Path | None, replaces: bool) -> Iterator[tuple[Path, Path | None]]:
    """A folder to fill, and one for what it lacks."""
    if undo is None:
        with written_beside(out, replaces=replaces) as beside:
            yield beside, None
    else:
        with written_together(out, undo, replaces=replaces) as both:
            yield both
