"""What fine-tuning did to the routers of a model folder; only the router tensors of both models are read.

Shapes: E experts of a layer, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from secateur.criteria.router_change import RouterChange
from secateur.errors import SecateurError
from secateur.model_folder.measure.adapter import CONFIG, WEIGHTS, Adapter, holds_adapter
from secateur.model_folder.measure.weights import router_rows
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder


def router_changes(finetuned: Path | ModelFolder, pretrained: ModelFolder) -> dict[int, RouterChange]:
    """{decoder layer with experts: how its router changed}.

    Args:
        finetuned: a model or its folder, or the folder of a PEFT LoRA adapter for `pretrained`.

    Raises:
        SecateurError: the two do not belong together (family, layers, numbers of experts, shapes), router tensors are
            quantised or not finite, or a router did not change.
    """
    before = router_rows(pretrained)
    if isinstance(finetuned, Path) and holds_adapter(finetuned):
        with _naming(f"{finetuned} ({CONFIG}, {WEIGHTS})"):
            return _changes(before, Adapter.read(finetuned).router_rows(pretrained, before), pretrained)
    folder = read_model_folder(finetuned) if isinstance(finetuned, Path) else finetuned
    _check_same_model(pretrained, folder)
    with _naming(str(folder.files.path)):
        return _changes(before, router_rows(folder), pretrained)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """While it lasts, an error begins with the name of the fine-tuned model, where it does not name a file of that."""
    try:
        yield
    except SecateurError as error:
        if str(error).startswith(name.partition(" (")[0]):
            raise
        raise SecateurError(f"{name}: {error}") from error


def _changes(
    before: Mapping[int, dict[str, Tensor]], after: Mapping[int, dict[str, Tensor]], pretrained: ModelFolder
) -> dict[int, RouterChange]:
    changes = {}
    for layer, tensors in before.items():
        _check_same_tensors(layer, tensors, after[layer])
        names = sorted(tensors)
        old, new = (torch.cat([rows[name].double() for name in names], dim=1) for rows in (tensors, after[layer]))
        changes[layer] = RouterChange.of_rows(f"the router of layer {layer}", old, new)
    unchanged = [layer for layer, change in changes.items() if not change.norm_of_difference.any()]
    if unchanged:
        which = "its routers" if len(unchanged) == len(changes) else f"its routers of layers {unchanged}"
        raise SecateurError(
            f"{which} are those of {pretrained.files.path}, so fine-tuning says nothing of the "
            "experts there; expected a model whose routers were trained"
        )
    return changes


def _check_same_model(pretrained: ModelFolder, finetuned: ModelFolder) -> None:
    base, tuned = pretrained.files.path, finetuned.files.path
    if pretrained.config.model_type != finetuned.config.model_type:
        raise SecateurError(
            f"{tuned} is a {finetuned.config.model_type!r} and {base} a {pretrained.config.model_type!r}, expected one "
            "family"
        )
    if pretrained.counts != finetuned.counts:
        wrong = [
            layer
            for layer in sorted(pretrained.counts.keys() | finetuned.counts.keys())
            if pretrained.counts.get(layer) != finetuned.counts.get(layer)
        ]
        raise SecateurError(
            f"{tuned} does not belong to {base}: layer {wrong[0]} has {finetuned.counts.get(wrong[0], 'no')} and "
            f"{pretrained.counts.get(wrong[0], 'no')} experts"
        )


def _check_same_tensors(layer: int, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    if before.keys() != after.keys():
        raise SecateurError(
            f"layer {layer}: router tensors {sorted(before)} in the pre-trained model and {sorted(after)} in the "
            "fine-tuned one, expected the same"
        )
    for name, rows in before.items():
        if rows.shape != after[name].shape:
            raise SecateurError(
                f"layer {layer}, {name}: {tuple(rows.shape)} in the pre-trained model and {tuple(after[name].shape)} "
                "in the fine-tuned one, expected the same (experts, width)"
            )
