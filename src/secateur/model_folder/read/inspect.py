"""What a model folder holds, for somebody who thinks of pruning it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.files.given import StrPath, check_given
from secateur.files.progress import OnStage
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.results import Result

SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
ATTENTION_KEY = "num_attention_experts"  # of BAM
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Inspection(Result):
    """What `inspect` found.

    Args:
        path, model_type: of the model. num_layers: its decoder layers.
        experts: {MoE layer: routed experts}. top_k: experts of a token. num_groups: router groups; 1 without groups.
        num_bytes: of all tensors. bytes_per_expert: {MoE layer: bytes that go with one expert}.
        limits: what a plan must respect, in words.
    """

    path: Path
    model_type: str
    num_layers: int
    experts: Mapping[int, int]
    top_k: int
    num_groups: int
    num_bytes: int
    bytes_per_expert: Mapping[int, int]
    limits: tuple[str, ...]


def inspect(
    model: StrPath, *, experts_from: Literal["config", "files"] = "config", on_progress: OnStage | None = None
) -> Inspection:
    """Say what a model folder holds and what can be pruned: family, experts, routers, bytes. Only headers are read.

    Args:
        model: the folder of a Hugging Face model.
        experts_from: what says how many experts a layer has: config (config.json), or files, for a model that a tool
            pruned without updating its config.json.
        on_progress: never called, as headers are read at once; every function takes it.

    Returns:
        The family, the experts of each layer, their bytes, and what limits a plan.

    Raises:
        SecateurError: no model folder, a damaged one, or a family that cannot be pruned; the message says why.

    Example:
        >>> found = secateur.inspect("models/Qwen3-30B-A3B")
        >>> found.experts[0], found.top_k
        (128, 8)
    """
    check_given(inspect, locals())
    folder = read_model_folder(Path(model), experts_from)
    limits, sizes = _limits(folder), bytes_per_expert(folder)
    return Inspection(
        path=folder.files.path,
        model_type=folder.config.model_type,
        num_layers=folder.config.num_layers,
        experts=dict(folder.counts),
        top_k=folder.config.top_k,
        num_groups=folder.config.num_groups,
        num_bytes=folder.files.num_bytes,
        bytes_per_expert=sizes,
        limits=tuple(limits),
        content=_content(folder, sizes, limits),
    )


def _content(source: ModelFolder, sizes: Mapping[int, int], limits: Sequence[str]) -> dict[str, Any]:
    model, folder = source.config, source.files
    size = Counter[str]()
    for name, tensor in folder.tensors.items():
        place = source.located.get(name)
        size["rest" if place is None else f"{place.role}s"] += tensor.length
    return {
        "format": "secateur-inspect",
        "version": 1,
        "path": str(folder.path),
        "model_type": model.model_type,
        "class": model.model_class.__name__,
        "read_as": model.read_as,
        "decoder_layers": model.num_layers,
        "experts": {str(layer): count for layer, count in source.counts.items()},
        "zero_slots": {str(layer): source.slots[layer] - source.counts[layer] for layer in source.config.kept},
        "mtp_experts": {str(layer): count for layer, count in source.mtp_counts.items()},
        "top_k": model.top_k,
        "groups": model.num_groups,
        "least_experts": model.min_experts,
        "shared_experts": _shared(source),
        "attention_experts": _attention_experts(source),
        "names": source.layout.title,
        "files": len(folder.headers),
        "tensors": len(folder.tensors),
        "bytes": {"experts": size["experts"], "routers": size["routers"], "rest": size["rest"]},
        "bytes_per_expert": {str(layer): count for layer, count in sizes.items()},
        "dtypes": dict(Counter(tensor.dtype for tensor in folder.tensors.values()).most_common()),
        "quantisation": folder.quantisation,
        "limits": list(limits),
    }


def bytes_per_expert(folder: ModelFolder, *, zero_slots: bool = False) -> dict[int, int]:
    """{layer: bytes that go with one of its experts, the router row included unless it stays as a zero slot}."""
    sizes = dict.fromkeys(folder.all_counts, 0)
    for name, place in folder.located.items():
        tensor = folder.files.tensors[name]
        if place.role == "router" and (zero_slots or folder.config.kept):
            continue
        if place.spec is not None:
            axis = place.spec.axis
            sizes[place.layer] += tensor.length * axis.rows_per_expert // tensor.shape[axis.dim]
        elif place.expert == 0:
            sizes[place.layer] += tensor.length
    return sizes


def _shared(folder: ModelFolder) -> int | None:
    """Shared experts a layer by the config; None where it does not say."""
    text = folder.config.text
    for key in SHARED_KEYS:
        value = getattr(text, key, None)
        value = max(value, default=None) if isinstance(value, list) else value
        if type(value) is int:
            return value
    return 1 if any(getattr(text, key, 0) for key in SHARED_WIDTHS) else None


def _attention_experts(folder: ModelFolder) -> int | None:
    """Attention experts a layer by the config; None where attention is not a mixture."""
    found = getattr(folder.config.text, ATTENTION_KEY, None)
    return found if type(found) is int and found > 1 else None


def _limits(folder: ModelFolder) -> list[str]:
    """What a plan for this model must respect, in words."""
    model = folder.config
    limits = [f"every layer keeps at least {model.min_experts} experts (top-k {model.top_k})"]
    if model.kept:
        limits = [
            "removed experts left zero slots, and rows of such routers are not cut: a further plan is applied with "
            "--removed zero-slot, and every layer keeps at least 1 expert"
        ]
    if model.num_groups > 1:
        limits.append(f"each of the {model.num_groups} router groups keeps the same number of its own experts")
    if model.is_nested and not model.kept:
        limits.append("all layers keep the same number: the experts are in a text model inside another")
    if folder.mtp_counts and not model.kept:
        layers = ", ".join(map(str, folder.mtp_counts))
        limits.append(
            f"the layers that predict further tokens ({layers}) must keep the number that config.json will say, or "
            "`apply` is told --mtp whole or --mtp drop"
        )
    if number := _attention_experts(folder):
        limits.append(
            f"the {number} attention experts of every layer stay as they are: a plan names experts of the FFN"
        )
    if folder.files.left_out:
        limits.append(f"weights in other forms are not carried along: {', '.join(map(str, folder.files.left_out))}")
    return limits
