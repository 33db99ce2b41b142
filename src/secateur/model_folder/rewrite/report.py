"""What `secateur apply` did to a model folder: report.json, and the same as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.json import read_object
from secateur.files.records import as_record
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.rewrite.card import MTP, who_loads
from secateur.model_folder.rewrite.pieces import NewTensor, router_is_untouched
from secateur.model_folder.rewrite.recipe import recipe
from secateur.plans import JSON, REROUTE, Plan
from secateur.reporting.html import document, section, table
from secateur.surgery.fits import check_copies
from secateur.surgery.report import FORMAT, VERSION
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.model_folder.rewrite.side_files import SideFiles

FORMAT_OF_FOLDER = "Hugging Face safetensors"
REPORT = "report.json"
VERIFIED = "verify.json"  # what `prune` leaves beside the files of `apply`


class Applied(Struct, frozen=True, kw_only=True):
    """What is read of report.json again; the rest is for people."""

    plan: dict[str, Any]
    mtp: Literal["whole", "drop"] | None = None
    experts_from: Literal["config", "files"] = "config"


def read_experts_from(path: Path) -> str:
    """What said how many experts the source has, from the report in a pruned folder. Raises as `read_applied`."""
    return _applied(path).experts_from


def read_applied(path: Path) -> tuple[Plan, str | None]:
    """(plan of the last step, what became of MTP layers) from the report in a pruned folder.

    Raises:
        SecateurError: no such file, or not the report of `apply`.
    """
    applied = _applied(path)
    try:
        plan = Plan.from_json(applied.plan)
        check_copies(plan)
        return plan, applied.mtp
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error


def _applied(path: Path) -> Applied:
    if not path.is_file():
        raise SecateurError(f"{path.parent}: no {path.name} in it; expected a folder that `apply` or `prune` wrote")
    return as_record(read_object(path), Applied, str(path))


def describe(
    folder: ModelFolder,
    given: Plan,
    plan: Plan,
    kept: Sequence[NewTensor],
    mtp: str | None,
    files: SideFiles,
) -> dict[str, JSON]:
    """The report: layers, tensors, bytes and files, before and after.

    Args:
        given: the plan of this step, without earlier ones; the report holds it. plan: the same, listing every layer.
        files: what becomes of those beside the weights.
    """
    left_out = folder.mtp if mtp == "drop" else frozenset()
    layers: dict[str, JSON] = {}
    changed = 0
    for layer, before in folder.all_counts.items():
        if layer in folder.mtp_counts and left_out:
            continue
        planned = plan.layers[layer]
        mine = [
            place for place in folder.located.values() if place.layer == layer and not router_is_untouched(place, plan)
        ]
        tensors = len(mine) if planned.gone else 0
        changed += tensors
        layers[str(layer)] = {
            "experts_before": before,
            "experts_after": planned.experts_after,
            "dropped": list(planned.dropped),
            "tensors_changed": tensors,
        }
    after = sum(tensor.length for tensor in kept)
    checkpoint: JSON = {
        "folder": ".",
        "format": FORMAT_OF_FOLDER,
        "tensors": len(folder.files.tensors),
        "tensors_changed": changed,
        "bytes_before": folder.files.num_bytes,
        "bytes_after": after,
    }
    why_left_out: JSON = {str(relative): why for relative, why in files.left_out.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "secateur": __version__,
        "source": str(folder.files.path),
        "name": folder.files.path.resolve().name,
        "model_type": folder.config.model_type,
        "criterion": plan.criterion,
        "removed": plan.removed or REROUTE,
        "plan": given.to_json(),
        "layers": layers,
        "checkpoints": [checkpoint],
        "bytes_before": folder.files.num_bytes,
        "bytes_after": after,
        "files_copied": [str(relative) for relative in files.copied],
        "files_left_out": [str(relative) for relative in files.left_out],
        **({"why_left_out": why_left_out} if why_left_out else {}),
        "configs_edited": ["config.json", *map(str, files.rewritten)],
        "mtp": mtp,
    }


def page(report: dict[str, Any]) -> str:
    """report.html."""
    layers = report["layers"]
    before, after = (sum(layer[f"experts_{when}"] for layer in layers.values()) for when in ("before", "after"))
    gigabytes = [in_words(report[f"bytes_{when}"]) for when in ("before", "after")]
    lead = (
        f"{after} of {before} experts of this {report['model_type']} model were kept by the criterion "
        f"{report['criterion']}. {gigabytes[0]} became {gigabytes[1]}. Every tensor is a copy of the original's bytes."
    )
    counts = {layer["experts_after"] for layer in layers.values()}
    notes = [who_loads(counts, report["removed"]), MTP.get(report["mtp"] or "", "")]
    rows = [
        (
            name,
            str(layer["experts_before"]),
            str(layer["experts_after"]),
            " ".join(map(str, layer["dropped"])) or "none",
        )
        for name, layer in layers.items()
    ]
    return document(
        f"{report['name']}, pruned",
        [
            f"<h1>{escape(report['name'])}, pruned</h1>",
            f'<p class="lead">{escape(lead)}</p>',
            *(f'<p class="note">{escape(note)}</p>' for note in notes if note),
            section("How the experts were chosen", table(("what", "value"), recipe(report["plan"]))),
            section("Layers", table(("layer", "experts before", "kept", "dropped"), rows)),
            section("Files left out", table(("file", "why"), list(report.get("why_left_out", {}).items()))),
        ],
    )
