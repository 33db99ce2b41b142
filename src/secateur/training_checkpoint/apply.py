"""Apply a plan to a folder with training checkpoints in it, into a new folder: all of it, or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from secateur import modeling_secateur
from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_json
from secateur.files.new_folder import (
    IS_THERE,
    check_apart,
    check_target,
    compared_beside,
    copy_file,
    occupied,
    written_beside,
)
from secateur.files.progress import OnProgress, counted, silent
from secateur.files.seen import Seen
from secateur.plans import JSON, Plan, is_side_file
from secateur.surgery.config_json import MODULE, has_expert_count, is_pruned, with_counts
from secateur.surgery.fits import check_multiple, check_reroutes
from secateur.training_checkpoint.changes import survey
from secateur.training_checkpoint.compare import verify_written
from secateur.training_checkpoint.metadata import is_dcp_folder, read_dcp
from secateur.training_checkpoint.names import Naming, find_naming
from secateur.training_checkpoint.report import Part, describe
from secateur.training_checkpoint.shards import is_shards_folder, read_shards
from secateur.training_checkpoint.stored import StoredCheckpoint
from secateur.training_checkpoint.write import write_dcp, write_shards

PLAN, REPORT, CONFIG, CODE = "plan.json", "report.json", "config.json", f"{MODULE}.py"

# Other files with weights: beside a pruned checkpoint they would be those of the unpruned model.
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "optimizer.pt",
    "optimizer.bin",
    "*.distcp",
    "*.metadata",
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of training checkpoints: how to know, read and write a folder of it."""

    found: Callable[[Path], bool]
    read: Callable[[Path], StoredCheckpoint]
    write: Callable[..., None]


FORMATS: Mapping[str, Format] = {
    "torch.distributed.checkpoint": Format(found=is_dcp_folder, read=read_dcp, write=write_dcp),
    "transformers distributed safetensors": Format(found=is_shards_folder, read=read_shards, write=write_shards),
}


def holds_training_checkpoint(source: Path) -> bool:
    """True when the folder, or a folder in it, is a training checkpoint of one of FORMATS."""
    return any(format.found(folder) for folder in _folders(source) for format in FORMATS.values())


def apply_to_checkpoint(
    source: Path,
    plan: Plan,
    out: Path,
    *,
    naming: Naming | None = None,
    expert_parallel: int = 1,
    dry_run: bool = False,
    on_bytes: OnProgress = silent,
) -> dict[str, JSON]:
    """Write `source` with the experts that `plan` keeps, in its order, to the new folder `out`.

    Model and optimizer state change together, in every checkpoint folder inside the source; opaque entries and all
    other files are copied byte for byte, a transformers config.json gets the new counts. The result is written beside
    `out`, compared with the source from the disk, and renamed.

    Args:
        naming: of the engine; found from the names where None.
        expert_parallel: every layer's new count must be a multiple of it.
        dry_run: check and report, write nothing.
        on_bytes: called with (bytes written, bytes to write).

    Returns:
        The report, which is also written as report.json. Where `out` is there already, byte for byte as it would be
        written, nothing is written, and it also has IS_THERE.

    Raises:
        SecateurError: the source is not such a checkpoint or is damaged, or was changed meanwhile; the plan does not
            fit, `out` is not free.
        OSError: the disk refused; nothing is left under the name of `out`.
    """
    may_be_there = not dry_run and not out.is_symlink() and (out / REPORT).is_file()
    if not may_be_there:
        check_target(source, out)
    check_apart(source, out)
    check_reroutes(plan)
    seen = Seen.of(path for path in sorted(source.rglob("*")) if path.is_file())
    parts = _parts(source, naming, plan)
    counts_before = _joint_counts(parts)
    filled = plan.filled(counts_before)  # lists every layer; what is saved is the plan that was given
    counts_after = {layer: layer_plan.experts_after for layer, layer_plan in filled.layers.items()}
    check_multiple(counts_after, expert_parallel)
    others = _other_files(source, parts)
    configs = _edited_configs(source, others, counts_before, counts_after)
    history = _with_earlier_plan(source, plan)
    copied = [relative for relative in others if relative not in configs]
    report = describe(source, filled, parts, copied, configs)
    if dry_run:
        return report
    if may_be_there and read_json(out / REPORT) != json.loads(json.dumps(report)):
        raise occupied(out, f"{REPORT} in it is of another source, another plan or other options")
    with (compared_beside if may_be_there else written_beside)(out) as beside:
        _write_parts(parts, beside, on_bytes)
        for relative in copied:
            copy_file(source / relative, beside / relative)
        for relative, config in configs.items():
            (beside / relative).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(beside / relative, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            if is_pruned(config):
                code = Path(modeling_secateur.__file__).read_text(encoding="utf-8")
                atomic_write(beside / relative.parent / CODE, code)
        history.save(beside / PLAN)
        for part in parts:
            verify_written(part.stored, FORMATS[part.format].read(beside / part.folder), part.survey.changes)
        atomic_write(beside / REPORT, json.dumps(report, indent=2) + "\n")
        seen.check([*(source / part.folder / name for part in parts for name in part.stored.files),
                    *(source / relative for relative in others)])  # fmt: skip
    return report | {IS_THERE: True} if may_be_there else report


def _parts(source: Path, naming: Naming | None, plan: Plan) -> list[Part]:
    parts = []
    for folder in _folders(source):
        for name, format in FORMATS.items():
            if not format.found(folder):
                continue
            stored = format.read(folder)
            try:
                found = naming or find_naming([*stored.tensors, *stored.blobs])
                changes = None if found is None else survey(stored, found, plan)
            except SecateurError as error:
                if str(error).startswith("plan: "):
                    raise
                raise SecateurError(f"{folder / stored.described_in}: {error}") from error
            if changes is not None:
                relative = PurePosixPath(folder.relative_to(source).as_posix())
                parts.append(Part(folder=relative, format=name, stored=stored, survey=changes))
    if not parts:
        raise SecateurError(f"{source}: no checkpoint with experts was found in it")
    return parts


def _joint_counts(parts: list[Part]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for part in parts:
        for layer, count in part.survey.counts.items():
            if counts.setdefault(layer, count) != count:
                raise SecateurError(f"layer {layer}: {count} experts in {part.folder}, {counts[layer]} elsewhere")
    return counts


def _folders(source: Path) -> list[Path]:
    """The folder and all folders in it; links to folders are not followed."""
    return [Path(folder) for folder, _, _ in os.walk(source)]


def _other_files(source: Path, parts: list[Part]) -> list[PurePosixPath]:
    """Files that belong to no part, to be copied.

    Raises:
        SecateurError: a file with weights of its own, a link that leads out of the folder, or no regular file.
    """
    known = {part.folder / name for part in parts for name in part.stored.files}
    made_here = {PurePosixPath(name) for name in (PLAN, REPORT)}
    found = []
    root = source.resolve()
    for folder, folders, names in os.walk(source):
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*names, *linked]:
            path = Path(folder) / name
            relative = PurePosixPath(path.relative_to(source).as_posix())
            if relative in known or relative in made_here or is_side_file(str(relative), PLAN):
                continue
            if not path.is_file() or not path.resolve().is_relative_to(root):
                raise SecateurError(f"{path}: not a regular file of the folder; it cannot be copied")
            if any(relative.match(pattern) for pattern in WEIGHTS):
                raise SecateurError(
                    f"{path}: it holds weights or optimizer state that this plan would not reach; take it out of the "
                    "folder, or give the folder of the training checkpoint alone"
                )
            if relative.name != CODE:
                found.append(relative)
    return sorted(found)


def _edited_configs(
    source: Path, others: list[PurePosixPath], before: Mapping[int, int], after: Mapping[int, int]
) -> dict[PurePosixPath, dict[str, Any]]:
    """Every config.json of a transformers model with experts, edited; others are plain files to copy."""
    edited = {}
    for relative in others:
        if relative.name != CONFIG:
            continue
        config = read_json(source / relative)
        if isinstance(config, dict) and has_expert_count(config):
            try:
                edited[relative] = with_counts(config, before, after)
            except SecateurError as error:
                raise SecateurError(f"{source / relative.parent}: {error}") from error
    return edited


def _with_earlier_plan(source: Path, plan: Plan) -> Plan:
    """With a plan.json in the source: both as one, so that every expert still knows its first id."""
    earlier = source / PLAN
    return Plan.load(earlier).compose(plan) if earlier.is_file() else plan


def _write_parts(parts: list[Part], beside: Path, on_bytes: OnProgress) -> None:
    on_chunk = counted(sum(part.bytes_after for part in parts), on_bytes)
    for part in parts:
        (beside / part.folder).mkdir(parents=True, exist_ok=True)
        FORMATS[part.format].write(part.stored, part.survey.changes, beside / part.folder, on_chunk)
