"""Apply a plan to a folder of whatever kind: a model, a training checkpoint, or a pruned model that is restored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import SecateurError
from secateur.files.given import StrPath, check_given, check_least
from secateur.files.new_folder import check_target
from secateur.files.progress import OnProgress, OnStage, stage
from secateur.model_folder.rewrite.report import REPORT
from secateur.model_folder.rewrite.undo import holds_undo
from secateur.plans import REMOVED, Plan
from secateur.results import Result, Written

if TYPE_CHECKING:
    from secateur.training_checkpoint.names import Naming

ABOUT_PLAN = "plan: "  # begins a message about a plan, of which only who read it knows where it is from


@dataclass(frozen=True, kw_only=True)
class Applied(Written):
    """What `apply` wrote, or of a dry run would write; `to_json` is what report.json says.

    Args:
        out: the new folder. undo: that of the dropped experts, or None.
        plan: what was applied; of a restored model None.
        experts_before, experts_after: {layer: experts}; empty of a restored model.
        bytes_before, bytes_after: of all tensors; of a restored model bytes_before is None.
    """

    undo: Path | None = None
    plan: Plan | None = field(default=None, repr=False)
    experts_before: dict[int, int]
    experts_after: dict[int, int]
    bytes_before: int | None = None
    bytes_after: int

    def table(self) -> Any:
        if self.plan is None:
            return ("", "value"), [("restored", self.out), ("bytes", self.bytes_after)]
        rows = [(layer, count, self.experts_after[layer]) for layer, count in self.experts_before.items()]
        return ("layer", "experts before", "after"), [*rows, ("bytes", self.bytes_before, self.bytes_after)]


def apply(
    source: StrPath,
    plan: Plan | StrPath | Result,
    out: StrPath,
    *,
    removed: Literal["reroute", "zero-slot"] | None = None,
    names: str = "auto",
    ep: int = 1,
    undo: StrPath | None = None,
    mtp: Literal["whole", "drop"] | None = None,
    experts_from: Literal["config", "files"] = "config",
    force: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
) -> Applied:
    """Write a model or a training checkpoint anew with the experts that a plan keeps, in its order.

    A model is a Hugging Face folder: its bytes are copied file by file and never decoded, in as little memory as one
    header takes. Given an undo folder in place of the plan, the model that was pruned is restored byte for byte.
    In a training checkpoint model and optimizer state change together; everything else is copied byte for byte.

    Args:
        source: the folder of a model or of a training checkpoint; it is only read.
        plan: a plan, its file, what `plan` or `place` gave back, or a folder that `undo` wrote.
        out: the folder to write; it must be new or empty, unless `force` is given.
        removed: what becomes of a removed expert where the plan leaves that open; see `Plan`.
        names: of the tensors of a training checkpoint: auto, transformers, torchtitan, or a JSON file.
        ep: expert-parallel ranks of the restart: every layer's new count must be a multiple.
        undo: of a model: a new folder for the dropped experts, to restore the source.
        mtp: of a model: what becomes of layers that predict further tokens and that the plan does not name: whole (they
            stay as they are, and config.json no longer fits them) or drop.
        experts_from: of a model: what says how many experts a layer has: config (config.json), or files, for a model
            that a tool pruned without updating its config.json; the result has the right one.
        force: of a model: replace an earlier result of `apply` or `prune` at `out`, in one step when the new one is
            complete; a folder that holds anything else is refused, and `undo` is never replaced.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called with ("writing", bytes written, bytes to write).

    Returns:
        What was written: layers, bytes, folders. Where the result is there already, byte for byte as it would be
        written, it is left as it is, and "is_there" is in `to_json()`.

    Raises:
        SecateurError: the source is damaged or of no known kind, the plan does not fit, or a target is not free.
        OSError: the disk refused; nothing is left under the names of `out` and `undo`.

    Example:
        >>> done = secateur.apply("models/Qwen3-30B-A3B", "plan.json", "pruned", undo="dropped")
        >>> done.experts_before[0], done.experts_after[0]
        (128, 96)
    """
    check_given(apply, locals())
    check_least(1, ep=ep)
    plan = _plan_in(plan) if isinstance(plan, Result) else plan
    source, out = Path(source), Path(out)
    side = None if undo is None else Path(undo)
    on_bytes = stage("writing", on_progress)
    if not isinstance(plan, Plan) and holds_undo(Path(plan)):
        if dry_run or force or undo or mtp or removed or names != "auto" or ep != 1 or experts_from != "config":
            raise SecateurError(f"{plan}: an undo folder; it restores all of the source and takes no other option")
        return _restored(source, Path(plan), out, on_bytes)
    if not force and not (out / REPORT).is_file():  # an earlier result may be what would be written
        check_target(source, out)
    write = _writer(source)
    decided = _meaning(plan if isinstance(plan, Plan) else Plan.load(Path(plan)), removed)
    with _named_plan(plan):
        report = write(
            source,
            decided,
            out,
            names=names,
            undo=side,
            mtp=mtp,
            experts_from=experts_from,
            force=force,
            expert_parallel=ep,
            dry_run=dry_run,
            on_bytes=on_bytes,
        )
    before, after = (
        {int(layer): counts[f"experts_{when}"] for layer, counts in report["layers"].items()}
        for when in ("before", "after")
    )
    return Applied(
        out=out,
        undo=side,
        plan=decided,
        experts_before=before,
        experts_after=after,
        bytes_before=report["bytes_before"],
        bytes_after=report["bytes_after"],
        content=report,
    )


@contextlib.contextmanager
def _named_plan(plan: Plan | StrPath) -> Iterator[None]:
    """While it lasts, an error that is about the plan begins with the file that it was read from."""
    try:
        yield
    except SecateurError as error:
        if isinstance(plan, Plan) or not str(error).startswith(ABOUT_PLAN):
            raise
        raise SecateurError(f"{plan}: {str(error).removeprefix(ABOUT_PLAN)}") from error


def _plan_in(result: Result) -> Plan:
    found = getattr(result, "plan", None)
    if not isinstance(found, Plan):
        raise SecateurError(
            f"plan: found {type(result).__name__} without a plan, expected a plan, its file, or a result"
        )
    return found


def _restored(pruned: Path, undo: Path, out: Path, on_bytes: OnProgress) -> Applied:
    from secateur.model_folder.rewrite.undo import restore

    restored = restore(pruned, undo, out, on_bytes=on_bytes)
    return Applied(out=out, experts_before={}, experts_after={}, bytes_after=restored["bytes"], content=restored)


def _meaning(plan: Plan, removed: str | None) -> Plan:
    """The plan with what was asked for, where it leaves that open."""
    if removed is None:
        return plan
    if removed not in REMOVED:
        raise SecateurError(f"--removed {removed}: expected {' or '.join(REMOVED)}")
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
    source: Path,
    plan: Plan,
    out: Path,
    *,
    names: str,
    undo: Path | None,
    mtp: str | None,
    experts_from: str,
    force: bool,
    **options: Any,
) -> dict[str, Any]:
    from secateur.training_checkpoint.apply import apply_to_checkpoint

    if undo is not None or mtp is not None or experts_from != "config" or force:
        raise SecateurError(
            f"--undo, --mtp, --experts-from and --force: for a model, but {source} is a training checkpoint"
        )
    return apply_to_checkpoint(source, plan, out, naming=_naming(names), **options)


def _apply_to_model(source: Path, plan: Plan, out: Path, *, names: str, **options: Any) -> dict[str, Any]:
    from secateur.model_folder.rewrite.apply import apply_to_model

    if names != "auto":
        raise SecateurError(f"--names {names}: for a training checkpoint, but {source} is a model")
    return apply_to_model(source, plan, out, **options)


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
