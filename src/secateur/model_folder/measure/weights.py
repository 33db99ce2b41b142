"""Sums over the weights of a model folder, for criteria without data; one expert of one tensor in memory at a time.

The projection matrices of an expert are its tensors with two axes or more; what has fewer is a bias or a scale and does
not count. The row of a router is what has more than one number an expert; one number an expert is a bias of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from secateur.criteria import CRITERIA
from secateur.criteria.weights import WeightStats
from secateur.errors import SecateurError
from secateur.files.dtypes import torch_dtypes
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.read.model_folder import ExpertPart, ModelFolder
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.rewrite.pieces import Copy, copies_of, whole

DTYPES = torch_dtypes("F64 F32 F16 BF16")
# what a criterion needs -> whose tensors those are, and what becomes of one expert's
READERS = {"expert weights": ("expert", WeightStats.of_experts), "router weights": ("router", WeightStats.of_router)}


def weight_stats(
    folder: ModelFolder, needs: str, *, layers: Collection[int] | None = None, on_bytes: OnProgress = silent
) -> dict[int, WeightStats]:
    """{layer with experts: sums over its weights}.

    Args:
        layers: those to read; without them all decoder layers with experts.
        needs: of a criterion, "expert weights" or "router weights"; nothing else is read.
        on_bytes: called with (bytes read, bytes to read).

    Raises:
        SecateurError: a tensor that would have to be decoded first, such as one of a quantised model, or one with an
            entry that is not finite; the message names it.
    """
    role, sums_of = READERS[needs]
    layers = folder.counts if layers is None else layers
    places = {name: place for name, place in folder.located.items() if place.role == role and place.layer in layers}
    tensors = {name: folder.files.tensors[name] for name in places}
    _check_types(needs, tensors)
    matrices = [name for name, tensor in tensors.items() if _is_matrix(tensor, places[name])]
    total, done = sum(tensors[name].length for name in matrices), 0
    sums: dict[int, WeightStats] = {}
    for file, names in itertools.groupby(sorted(matrices, key=lambda name: _where(tensors[name])), _file_in(tensors)):
        with (folder.files.path / file).open("rb") as opened:
            for name in names:
                place, tensor = places[name], tensors[name]
                count = folder.all_counts[place.layer]
                for expert, copies in _by_expert(name, tensor, place, count):
                    row = _read(opened, folder.files.path / file, copies, DTYPES[tensor.dtype])
                    one = sums_of(name, row[None], first=expert, num_experts=count)
                    sums[place.layer] = sums[place.layer] + one if place.layer in sums else one
                done += tensor.length
                on_bytes(done, total)
    return dict(sorted(sums.items()))


def router_rows(folder: ModelFolder) -> dict[int, dict[str, Tensor]]:
    """{decoder layer with experts: {rule of a router tensor: (E, ...) a row for each expert, as stored}}.

    Raises:
        SecateurError: a router that is quantised.
    """
    rows: dict[int, dict[str, list[Tensor]]] = {}
    for name, place in folder.located.items():
        tensor = folder.files.tensors[name]
        if place.role != "router" or place.layer not in folder.counts or not _is_matrix(tensor, place):
            continue
        _check_types("router weights", {name: tensor})
        path = folder.files.path / tensor.file
        mine = rows.setdefault(place.layer, {}).setdefault(place.key, [])
        with path.open("rb") as opened:
            for _, copies in _by_expert(name, tensor, place, folder.counts[place.layer]):
                mine.append(_read(opened, path, copies, DTYPES[tensor.dtype]))
    return {layer: {key: torch.stack(one) for key, one in keys.items()} for layer, keys in sorted(rows.items())}


def _check_types(needs: str, tensors: dict[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            others = ", ".join(criterion.name for criterion in CRITERIA.values() if criterion.needs != needs)
            raise SecateurError(
                f"{name} has type {tensor.dtype}, expected one of {', '.join(DTYPES)}: {needs} that are quantised "
                f"cannot be read; criteria that do without them: {others}"
            )


def _is_matrix(tensor: StoredTensor, place: ExpertPart) -> bool:
    """Whether an expert's part of the tensor is a projection matrix, or a router's row."""
    entries, axes = math.prod(tensor.shape), len(tensor.shape)
    if place.spec is not None:
        axis = place.spec.axis
        entries = entries // tensor.shape[axis.dim] * axis.rows_per_expert
        axes -= axis.rows_per_expert == 1
    return entries > 1 if place.role == "router" else axes > 1 and entries > 0


def _where(tensor: StoredTensor) -> tuple[str, int]:
    return tensor.file, tensor.start


def _file_in(tensors: dict[str, StoredTensor]) -> Callable[[str], str]:
    return lambda name: tensors[name].file


def _by_expert(
    name: str, tensor: StoredTensor, place: ExpertPart, count: int
) -> Iterator[tuple[int, tuple[Copy, ...]]]:
    """(expert, where its bytes are), for every expert that the tensor holds."""
    if place.spec is None:
        yield place.expert, (whole(tensor),)
        return
    for expert in range(count):
        rows = place.spec.rows([expert], count)[:1]  # without those that belong to no expert
        yield expert, tuple(copies_of(name, tensor, place.spec.axis.dim, rows))


def _read(file: BinaryIO, path: Path, copies: tuple[Copy, ...], dtype: torch.dtype) -> Tensor:
    """The entries of the bytes, one after another, in one axis."""
    data = bytearray(sum(piece.length for piece in copies))
    view, at = memoryview(data), 0
    for piece in copies:
        file.seek(piece.start)
        if file.readinto(view[at : at + piece.length]) != piece.length:  # type: ignore[attr-defined]
            raise SecateurError(f"{path}: it has become shorter while it was read")
        at += piece.length
    return torch.frombuffer(data, dtype=dtype)
