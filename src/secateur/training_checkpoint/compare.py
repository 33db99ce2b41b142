"""Compare a written checkpoint with its source, expert by expert, from the disk.

The rows are found by another way than they were written: here one expert is looked up at a time on either side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.training_checkpoint.changes import Change
from secateur.training_checkpoint.pieces import new_shape, pieces
from secateur.training_checkpoint.rows import read_bytes, read_rows
from secateur.training_checkpoint.stored import StoredCheckpoint, StoredTensor

BLOCK_BYTES = 64 * 2**20


def verify_written(source: StoredCheckpoint, written: StoredCheckpoint, changes: Mapping[str, Change]) -> None:
    """Check that `written` has every entry of `source`, changed as `changes` say and else the same, byte for byte.

    Raises:
        SecateurError: an entry is missing, unexpected, or differs.
    """
    for what, before, after in (
        ("tensors", source.tensors.keys(), written.tensors.keys()),
        ("opaque entries", source.blobs.keys(), written.blobs.keys()),
    ):
        if before != after:
            raise SecateurError(f"verify: {what} {sorted(before ^ after)[:3]} are in one checkpoint only")
    if source.paths != written.paths:
        raise SecateurError("verify: the entries are at other places of the state dict than in the source")
    for name, blob in source.blobs.items():
        if read_bytes(blob) != read_bytes(written.blobs[name]):
            raise SecateurError(f"verify: {name} differs from the source")
    for name, old in source.tensors.items():
        new, change = written.tensors[name], changes.get(name)
        shape = new_shape(old, changes)
        if (new.shape, new.dtype) != (shape, old.dtype):
            raise SecateurError(f"verify: {name} is {new.shape} {new.dtype}, expected {shape} {old.dtype}")
        if not _same(old, new, change):
            raise SecateurError(f"verify: {name} differs from the source")


def _same(old: StoredTensor, new: StoredTensor, change: Change | None) -> bool:
    blocks = pieces(new, new.shape, BLOCK_BYTES)
    if change is None:
        ranges = (range(block.first, block.first + block.rows) for block in blocks)
        return all(_equal(read_rows(old, rows), read_rows(new, rows)) for rows in ranges)
    if change.to_zero:
        return all(not read_rows(new, range(b.first, b.first + b.rows)).any() for b in blocks)
    dim = change.spec.axis.dim
    if dim == 0:
        return all(
            _equal(read_rows(old, range(a, a + n)), read_rows(new, range(b, b + n))) for a, b, n in _matches(change)
        )
    for block in blocks:
        rows = range(block.first, block.first + block.rows)
        before, after = read_rows(old, rows), read_rows(new, rows)
        if not all(_equal(before.narrow(dim, a, n), after.narrow(dim, b, n)) for a, b, n in _matches(change)):
            return False
    return True


def _matches(change: Change) -> list[tuple[int, int, int]]:
    """(start before, start after, entries) on the expert axis, for each kept expert and for what belongs to none."""
    axis, layer_plan = change.spec.axis, change.layer_plan
    rows = axis.rows_per_expert
    found = [(old * rows, new * rows, rows) for new, old in enumerate(layer_plan.order)]
    if axis.num_trailing:
        found.append((layer_plan.experts_before * rows, layer_plan.experts_after * rows, axis.num_trailing))
    return found


def _equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, also where a NaN is no equal of itself."""
    return torch.equal(left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8))
