"""Compare a written folder with its source, byte by byte, from the disk.

What belongs together is found by another way than it was written: the written folder is read and understood as any
other, and one expert is looked up at a time on either side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor
from secateur.files.progress import OnChunk
from secateur.files.refused import naming
from secateur.model_folder.read.model_folder import ExpertPart, ModelFolder
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.rewrite.pieces import router_is_untouched
from secateur.plans import LayerPlan, Plan

BUFFER = 2**20  # bytes of either side in memory: they stay in the cache of the processor


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor that is not what the plan makes of the source."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def differences(
    source: ModelFolder,
    written: ModelFolder,
    plan: Plan,
    left_out: frozenset[str] = frozenset(),
    *,
    ends: int | None = None,
    on_chunk: OnChunk = lambda count: None,
) -> Iterator[Difference]:
    """Every tensor of the two folders that is missing, unexpected, or not equal to its source.

    Args:
        plan: lists every layer (`Plan.filled`). left_out: tensors of the source that were left out on purpose.
        ends: of every piece that was copied compare only so many bytes at its beginning and at its end.
        on_chunk: called with the numbers of bytes that were compared.
    """
    wanted = {_place(source.located.get(name), name): name for name in source.files.tensors if name not in left_out}
    for name, place in source.located.items():
        if place.spec is None and place.expert in plan.layers[place.layer].gone:
            wanted.pop(_place(place, name), None)
    with _Files(source.files.path) as old, _Files(written.files.path) as new:
        for name, tensor in written.files.tensors.items():
            here = written.located.get(name)
            key = _old_place(here, name, plan)
            from_name = wanted.pop(key, None) if key is not None else None
            if from_name is None:
                yield Difference(name=name, what="is unexpected")
                continue
            before = source.files.tensors[from_name]
            spec = None if here is None or router_is_untouched(here, plan) else here.spec
            layer_plan = None if here is None or spec is None else plan.layers[here.layer]
            if tensor.dtype != before.dtype or tensor.shape != _new_shape(before, spec, layer_plan):
                yield Difference(name=name, what=f"is {tensor.dtype} {list(tensor.shape)}, unlike {from_name}")
                continue
            spans: Iterable[tuple[int, int, int]] = [(0, 0, tensor.length)]
            if spec is not None and layer_plan is not None:
                spans = _rows(before, tensor, spec, layer_plan)
            same = all(
                _equal(old.read(before, a, length), new.read(tensor, b, length), length, on_chunk)
                for start_a, start_b, size in spans
                for a, b, length in _parts(start_a, start_b, size, ends)
            )
            if not same:
                yield Difference(name=name, what=f"differs from {from_name} of the source")
    for name in wanted.values():
        yield Difference(name=name, what="is missing")


def verify_written(source: ModelFolder, written: ModelFolder, plan: Plan, left_out: frozenset[str], ends: int) -> None:
    """Raise SecateurError at the first of `differences`."""
    for difference in differences(source, written, plan, left_out, ends=ends):
        raise SecateurError(f"verify: {difference}")


_Place = tuple[int, str, int, str] | str


def _place(place: ExpertPart | None, name: str) -> _Place:
    return name if place is None or place.spec is not None else (place.layer, place.key, place.expert, place.after)


def _old_place(here: ExpertPart | None, name: str, plan: Plan) -> _Place | None:
    if here is None or here.spec is not None:
        return name
    if here.layer not in plan.layers:
        return None
    order = plan.layers[here.layer].order
    return (here.layer, here.key, order[here.expert], here.after) if here.expert < len(order) else None


def _new_shape(before: StoredTensor, spec: ExpertTensor | None, layer_plan: LayerPlan | None) -> tuple[int, ...]:
    if spec is None or layer_plan is None:
        return before.shape
    return spec.axis.resized(before.shape, layer_plan.experts_after)


def _rows(
    before: StoredTensor, after: StoredTensor, spec: ExpertTensor, layer_plan: LayerPlan
) -> Iterator[tuple[int, int, int]]:
    """(offset in the source's tensor, offset in the written one, bytes) of every expert."""
    axis = spec.axis
    outer = math.prod(before.shape[: axis.dim])
    old_sizes, new_sizes = before.shape[axis.dim], after.shape[axis.dim]
    row = before.length // max(outer * old_sizes, 1)
    pairs = [(old * axis.rows_per_expert, new * axis.rows_per_expert) for new, old in enumerate(layer_plan.order)]
    spans = [(old, new, axis.rows_per_expert) for old, new in pairs]
    if axis.num_trailing:
        spans.append((old_sizes - axis.num_trailing, new_sizes - axis.num_trailing, axis.num_trailing))
    for turn in range(outer):
        for old, new, count in spans:
            yield (turn * old_sizes + old) * row, (turn * new_sizes + new) * row, count * row


def _parts(a: int, b: int, length: int, ends: int | None) -> Iterator[tuple[int, int, int]]:
    if ends is not None and length > 2 * ends:
        yield a, b, ends
        yield a + length - ends, b + length - ends, ends
        return
    for done in range(0, length, BUFFER):
        yield a + done, b + done, min(BUFFER, length - done)


class _Files:
    """Files of a folder, one open at a time, read into one buffer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name, self._descriptor = folder, "", -1
        self._buffer = bytearray(BUFFER)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, tensor: StoredTensor, offset: int, length: int) -> bytearray:
        """At most BUFFER bytes; what is given back is written over by the next call."""
        if tensor.file != self._name:
            self.__exit__()
            self._name, self._descriptor = tensor.file, os.open(self._folder / tensor.file, os.O_RDONLY)
        with naming(self._folder / tensor.file):
            return read_into(self._buffer, self._descriptor, length, tensor.start + offset)


def read_into(buffer: bytearray, descriptor: int, length: int, offset: int) -> bytearray:
    """`length` bytes of a file, fewer at its end: the buffer itself where they fill it, else a piece of its own."""
    count = os.preadv(descriptor, [memoryview(buffer)[:length]], offset)
    return buffer if count == len(buffer) else buffer[:count]


def same_files(left: Path, right: Path) -> bool:
    """Whether two files hold the same bytes."""
    buffers = bytearray(BUFFER), bytearray(BUFFER)
    with left.open("rb", buffering=0) as old, right.open("rb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        return size == os.fstat(new.fileno()).st_size and all(
            read_into(buffers[0], old.fileno(), BUFFER, at) == read_into(buffers[1], new.fileno(), BUFFER, at)
            for at in range(0, size, BUFFER)
        )


def _equal(old: bytearray, new: bytearray, length: int, on_chunk: OnChunk) -> bool:
    on_chunk(length)
    return len(new) == length and old == new
