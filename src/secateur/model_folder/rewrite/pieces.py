"""What a plan makes of the tensors of a folder: each new one a list of pieces. What is a copy is never decoded.

Shapes: E experts before, N experts after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from secateur.errors import SecateurError
from secateur.files.safetensors_header import BITS
from secateur.model_folder.read.model_folder import ExpertPart, ModelFolder
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.plans import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """`length` bytes of `file` from `start`, as they are."""

    file: str
    start: int
    length: int


class Piece(Protocol):
    """What a tensor is made of; every kind has a line in `writer.APPEND`."""

    @property
    def length(self) -> int:
        """In bytes."""


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to write: the bytes of `pieces`, one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)


def kept_tensors(folder: ModelFolder, plan: Plan, left_out: frozenset[str] = frozenset()) -> list[NewTensor]:
    """The tensors of the pruned model, in the order of the source; those in `left_out` are left out.

    Experts are numbered 0 to N - 1 in the order of the plan, which lists every layer (`Plan.filled`).
    """
    made = []
    for name, tensor in folder.files.tensors.items():
        place = folder.located.get(name)
        if name in left_out:
            continue
        if place is None or router_is_untouched(place, plan):
            made.append(_unchanged(name, tensor))
            continue
        layer_plan = plan.layers[place.layer]
        order = layer_plan.order
        if place.spec is not None:
            rows = place.spec.rows(order, layer_plan.experts_before)
            made.append(_rows(name, tensor, place.spec.axis.dim, rows))
        elif place.expert in order:
            made.append(_unchanged(new_name(place, order.index(place.expert)), tensor))
    return made


def dropped_tensors(folder: ModelFolder, plan: Plan, left_out: frozenset[str] = frozenset()) -> list[NewTensor]:
    """What `kept_tensors` leaves: the experts whose slot goes, under their old names, in their old order."""
    made = []
    for name, tensor in folder.files.tensors.items():
        place = folder.located.get(name)
        if name in left_out:
            made.append(_unchanged(name, tensor))
            continue
        if place is None or router_is_untouched(place, plan):
            continue
        layer_plan = plan.layers[place.layer]
        gone = layer_plan.gone
        if not gone:
            continue
        if place.spec is not None:
            rows = place.spec.rows(gone, layer_plan.experts_before)[: len(gone)]  # trailing ones are kept
            made.append(_rows(name, tensor, place.spec.axis.dim, rows))
        elif place.expert in gone:
            made.append(_unchanged(name, tensor))
    return made


def router_is_untouched(place: ExpertPart, plan: Plan) -> bool:
    """Whether a plan leaves this tensor of experts or a router as it is, in every layer."""
    return plan.leaves_zero_slots and place.role == "router"


def new_name(place: ExpertPart, expert: int) -> str:
    return f"{place.before}{expert}.{place.after}"


def copies_of(name: str, tensor: StoredTensor, dim: int, rows: Iterable[range]) -> Iterator[Copy]:
    """The bytes of entries along one axis, as `ExpertAxis.rows` names them: once for each entry of the axes before it.

    Neighbours are joined. `name` is for messages.

    Raises:
        SecateurError: an entry does not begin and end with a byte.
    """
    before = math.prod(tensor.shape[:dim])
    block_bits = math.prod(tensor.shape[dim + 1 :]) * BITS[tensor.dtype]
    if block_bits % 8:
        raise SecateurError(f"{name}: a row of {block_bits} bits; experts that share a byte cannot be told apart")
    block = block_bits // 8
    runs = _joined(rows)
    for turn in range(before):
        first = tensor.start + turn * tensor.shape[dim] * block
        for run in runs:
            yield Copy(file=tensor.file, start=first + run.start * block, length=len(run) * block)


def _joined(rows: Iterable[range]) -> list[range]:
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row.start:
            runs[-1] = range(runs[-1].start, row.stop)
        else:
            runs.append(row)
    return runs


def whole(tensor: StoredTensor) -> Copy:
    """All bytes of a tensor."""
    return Copy(file=tensor.file, start=tensor.start, length=tensor.length)


def _unchanged(name: str, tensor: StoredTensor) -> NewTensor:
    return NewTensor(name=name, dtype=tensor.dtype, shape=tensor.shape, pieces=(whole(tensor),))


def _rows(name: str, tensor: StoredTensor, dim: int, rows: Sequence[range]) -> NewTensor:
    shape = (*tensor.shape[:dim], sum(map(len, rows)), *tensor.shape[dim + 1 :])
    return NewTensor(name=name, dtype=tensor.dtype, shape=shape, pieces=tuple(copies_of(name, tensor, dim, rows)))
