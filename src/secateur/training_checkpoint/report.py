"""What `secateur apply` did to a training checkpoint, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.plans import JSON, Plan
from secateur.surgery.report import FORMAT, VERSION
from secateur.training_checkpoint.changes import Survey
from secateur.training_checkpoint.pieces import bytes_after
from secateur.training_checkpoint.stored import StoredCheckpoint
from secateur.version import __version__


@dataclass(frozen=True, kw_only=True)
class Part:
    """One checkpoint in the source: its folder, relative to the source, its format, and what becomes of it."""

    folder: PurePosixPath
    format: str
    stored: StoredCheckpoint
    survey: Survey

    @property
    def bytes_after(self) -> int:
        return bytes_after(self.stored, self.survey.changes)


def describe(
    source: Path,
    plan: Plan,
    parts: Sequence[Part],
    copied: Sequence[PurePosixPath],
    configs: Mapping[PurePosixPath, Any],
) -> dict[str, JSON]:
    """The report: layers, checkpoints, bytes and files, before and after. `plan` lists every layer."""
    layers: dict[str, JSON] = {}
    for layer, layer_plan in plan.layers.items():
        changed = [change for part in parts for change in part.survey.changes.values() if change.layer == layer]
        layers[str(layer)] = {
            "experts_before": layer_plan.experts_before,
            "experts_after": layer_plan.experts_after,
            "dropped": list(layer_plan.dropped),
            "tensors_changed": len(changed),
        }
    checkpoints: list[JSON] = []
    for part in parts:
        changes = part.survey.changes.values()
        checkpoints.append(
            {
                "folder": str(part.folder),
                "format": part.format,
                "tensors": len(part.stored.tensors),
                "tensors_changed": len(changes),
                "counters_reset": sum(change.to_zero for change in changes),
                "opaque_entries_copied": len(part.stored.blobs),
                "bytes_before": part.stored.num_bytes,
                "bytes_after": part.bytes_after,
            }
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "secateur": __version__,
        "source": str(source),
        "criterion": plan.criterion,
        "layers": layers,
        "checkpoints": checkpoints,
        "bytes_before": sum(part.stored.num_bytes for part in parts),
        "bytes_after": sum(part.bytes_after for part in parts),
        "files_copied": [str(relative) for relative in copied],
        "configs_edited": [str(relative) for relative in configs],
    }
