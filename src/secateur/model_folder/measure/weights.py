"""Sums over the weights of a model folder, for criteria without data; WORKERS times one tensor of one expert in memory.

The projection matrices of an expert are its tensors with two axes or more; what has fewer is a bias or a scale and does
not count. The row of a router is what has more than one number an expert; one number an expert is a bias of it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO

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

WORKERS = min(4, os.cpu_count() or 1)
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
    matrices.sort(key=lambda name: (tensors[name].file, tensors[name].start))
    parts = [part for name in matrices for part in _by_expert(name, tensors[name], places[name], folder)]
    total, done = sum(part.length for part in parts), 0
    sums: dict[int, WeightStats] = {}
    with _workers() as pool:
        for file, of_file in itertools.groupby(parts, lambda part: part.copies[0].file):
            with (folder.files.path / file).open("rb", buffering=0) as opened:
                here = list(of_file)
                for part, one in zip(here, pool.map(partial(_sums, sums_of, opened), here), strict=True):
                    sums[part.layer] = sums[part.layer] + one if part.layer in sums else one
                    done += part.length
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
        mine = rows.setdefault(place.layer, {}).setdefault(place.key, [])
        with (folder.files.path / tensor.file).open("rb", buffering=0) as opened:
            mine += [_read(opened, part) for part in _by_expert(name, tensor, place, folder)]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Of a tensor, what one expert of the `count` of its layer has, and where its bytes are."""

    name: str
    dtype: torch.dtype
    layer: int
    expert: int
    count: int
    copies: tuple[Copy, ...]

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.copies)


def _by_expert(name: str, tensor: StoredTensor, place: ExpertPart, folder: ModelFolder) -> Iterator[_Part]:
    """One for every expert that the tensor holds."""
    count, dtype = folder.all_counts[place.layer], DTYPES[tensor.dtype]
    found: dict[int, tuple[Copy, ...]] = {place.expert: (whole(tensor),)}
    if (spec := place.spec) is not None:  # by rows, without those that belong to no expert
        rows = [spec.rows([expert], count)[:1] for expert in range(count)]
        found = {expert: tuple(copies_of(name, tensor, spec.axis.dim, of_one)) for expert, of_one in enumerate(rows)}
    for expert, copies in found.items():
        yield _Part(name=name, dtype=dtype, layer=place.layer, expert=expert, count=count, copies=copies)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that work on one expert each; that several work on one costs more, where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of those that begin now
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _sums(sums_of: Callable[..., WeightStats], file: FileIO, part: _Part) -> WeightStats:
    return sums_of(part.name, _read(file, part)[None], first=part.expert, num_experts=part.count)


def _read(file: FileIO, part: _Part) -> Tensor:
    """The entries of a part, one after another, in one axis."""
    data = bytearray(part.length)
    view = memoryview(data)
    for piece in part.copies:
        done = 0
        while done < piece.length:
            count = os.preadv(file.fileno(), [view[done : piece.length]], piece.start + done)
            if not count:
                raise SecateurError(f"{file.name}: it has become shorter while it was read")
            done += count
        view = view[piece.length :]
    return torch.frombuffer(data, dtype=part.dtype)
