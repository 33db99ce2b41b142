"""How well models tell classes of images, and how sure a difference between two models on the same images is.

Shapes: N images, B images of a batch, M members of an ensemble, C classes. Cross entropy is in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.errors import SecateurError
from secateur.model_folder.evaluation.bootstrap import paired, standard_error

TOP = 5  # of these many best classes, where there are more
Scores = dict[str, Tensor]  # "accuracy", "top5_accuracy" (with more than TOP classes), "cross_entropy" -> (N,) float64


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Of a batch: logits (B, C), or of members (B, M, C), of which it is the mean; labels (B,). In float32.

    Raises:
        SecateurError: logits that are no numbers.
    """
    if not bool(logits.isfinite().all()):
        raise SecateurError("the model gives logits that are no numbers")
    by_member = (logits if logits.dim() == 3 else logits[:, None]).float().cpu()
    num_members, num_classes = by_member.shape[1:]
    expected = labels[:, None].expand(-1, num_members)
    found = {"accuracy": _among_best(by_member, expected, 1)}
    if num_classes > TOP:
        found["top5_accuracy"] = _among_best(by_member, expected, TOP)
    found["cross_entropy"] = cross_entropy(by_member.transpose(1, 2), expected, reduction="none")
    return {name: each.double().mean(dim=1) for name, each in found.items()}


def _among_best(logits: Tensor, labels: Tensor, number: int) -> Tensor:
    return (logits.topk(number, dim=-1).indices == labels[..., None]).any(dim=-1)


def joined(parts: Sequence[Scores]) -> Scores:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(found: Scores) -> dict[str, Any]:
    """Mean and standard error of each, as JSON; the error is null for a single image."""
    result: dict[str, Any] = {}
    for name, each in found.items():
        result[name] = float(each.mean())
        result[f"{name}_standard_error"] = standard_error(each, torch.ones_like(each))
    return result


def difference(found: Scores, reference: Scores, *, seed: int = 0) -> dict[str, Any]:
    """How much more than `reference` on the same images, image by image; see `paired`."""
    return {name: paired(each - reference[name], torch.ones_like(each), seed=seed) for name, each in found.items()}


def as_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The results of several models as a table, its head first."""
    has_top5 = "top5_accuracy" in models[0]
    has_members = any(model["members"] for model in models)
    head = ["model", "accuracy", *(["top 5"] if has_top5 else []), "cross entropy"]
    head += ["a member's accuracy"] if has_members else []
    head += ["images/s", "GFLOP/image", "parameters"]
    head += ["accuracy minus the first (95 % range)"] if len(models) > 1 else []
    rows = [head]
    for model in models:
        row = [model["path"], _percent(model["accuracy"], model["accuracy_standard_error"])]
        row += [_percent(model["top5_accuracy"])] if has_top5 else []
        row.append(f"{model['cross_entropy']:.4f}")
        if has_members:
            row.append(_percent(model["members"]["accuracy"]) if model["members"] else "")
        row += [
            f"{model['images_per_second']:.0f}",
            f"{model['flops_per_image'] / 1e9:.4g}",
            f"{model['parameters']:,}",
        ]
        if len(models) > 1:
            row.append(_difference(model["difference"]))
        rows.append(row)
    return rows


def _percent(share: float, error: float | None = None) -> str:
    return f"{100 * share:.2f} %" + ("" if error is None else f" ± {100 * error:.2f}")


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    more = found["accuracy"]
    within = "" if more["low"] is None else f" ({100 * more['low']:+.2f} to {100 * more['high']:+.2f})"
    return f"{100 * more['mean']:+.2f}{within}"
