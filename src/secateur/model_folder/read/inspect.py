"""What a model folder holds, for somebody who thinks of pruning it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder

SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")


def inspect_model(path: Path) -> dict[str, Any]:
    """Family, experts, routers, bytes and what can be pruned, as JSON; only headers are read.

    Raises:
        SecateurError: no model folder, a damaged one, or a family that cannot be pruned; the message says why.
    """
    return describe(read_model_folder(path))


def describe(source: ModelFolder) -> dict[str, Any]:
    """See `inspect_model`."""
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
        "decoder_layers": model.num_layers,
        "experts": {str(layer): count for layer, count in source.counts.items()},
        "zero_slots": {str(layer): source.slots[layer] - source.counts[layer] for layer in source.config.kept},
        "mtp_experts": {str(layer): count for layer, count in source.mtp_counts.items()},
        "top_k": model.top_k,
        "groups": model.num_groups,
        "least_experts": model.min_experts,
        "shared_experts": _shared(source),
        "names": source.layout.title,
        "files": len(folder.headers),
        "tensors": len(folder.tensors),
        "bytes": {"experts": size["experts"], "routers": size["routers"], "rest": size["rest"]},
        "bytes_per_expert": {str(layer): count for layer, count in bytes_per_expert(source).items()},
        "dtypes": dict(Counter(tensor.dtype for tensor in folder.tensors.values()).most_common()),
        "quantisation": folder.quantisation,
        "limits": _limits(source),
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
    if folder.files.left_out:
        limits.append(f"weights in other forms are not carried along: {', '.join(map(str, folder.files.left_out))}")
    return limits
