"""Which rank holds which rows of a sharded tensor, and how rows change hands.

A rank's rows are one contiguous range: every mesh dimension that shards axis 0 cuts the range into chunks, as
`torch.chunk` does. Legend: N rows of the whole tensor, N' of the new one, M ranks of the mesh in its own order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from secateur.errors import SecateurError


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """How axis 0 of a DTensor lies over the ranks of its mesh.

    mesh_shape: sizes of the mesh dimensions. cuts: the mesh dimensions that cut axis 0, first cut first.
    """

    mesh_shape: tuple[int, ...]
    cuts: tuple[int, ...]

    def ranges(self, num_rows: int) -> list[range]:
        """(M,) the rows of each rank."""
        return [self._range(num_rows, coordinate) for coordinate in self.coordinates()]

    def partners(self, rank: int) -> list[int]:
        """The ranks that hold every row once between them, `rank` itself among them."""
        coordinates = self.coordinates()
        same = [dim for dim in range(len(self.mesh_shape)) if dim not in self.cuts]
        me = coordinates[rank]
        return [other for other, at in enumerate(coordinates) if all(at[dim] == me[dim] for dim in same)]

    def coordinates(self) -> list[tuple[int, ...]]:
        """(M,) where each rank is in the mesh."""
        return list(itertools.product(*map(range, self.mesh_shape)))

    def _range(self, num_rows: int, coordinate: Sequence[int]) -> range:
        rows = range(num_rows)
        for dim in self.cuts:
            size = -(-len(rows) // self.mesh_shape[dim])
            rows = rows[coordinate[dim] * size : (coordinate[dim] + 1) * size]
        return rows


def layout_of(tensor: DTensor, name: str) -> RowLayout:
    """How the rows of a DTensor lie.

    Raises:
        SecateurError: a placement that is neither replicated nor by contiguous rows, nor by another axis.
    """
    shape = tuple(tensor.device_mesh.shape)
    plain, strided = [], []
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, _StridedShard):
            if placement.dim == 0:
                strided.append((dim, placement.split_factor))
        elif isinstance(placement, Shard):
            if placement.dim == 0:
                plain.append(dim)
        elif not placement.is_replicate():
            raise SecateurError(f"{name}: placements {tensor.placements}, expected sharded or replicated ones")
    # FSDP's cut of what model parallelism has cut before; its split factor says into how many parts
    if len(strided) > 1 or any(factor != math.prod(shape[dim] for dim in plain) for _, factor in strided):
        raise SecateurError(
            f"{name}: placements {tensor.placements} on a mesh of shape {shape}, expected at most one strided one, "
            "which cuts what all others have cut"
        )
    return RowLayout(mesh_shape=shape, cuts=(*plain, *(dim for dim, _ in strided)))


def take_rows(tensor: DTensor, name: str, index: Tensor) -> Tensor:
    """This rank's part of `tensor.index_select(0, index)` sharded as `tensor` is; all ranks of its mesh must call.

    Args:
        tensor: (N, ...). name: for messages. index: (N',) int64 row numbers on the host, the same on every rank; a row
            may be taken several times or not at all.

    Returns:
        (own rows of the N', ...) a plain tensor; other axes as they are on this rank.

    Raises:
        SecateurError: see `layout_of`.
    """
    layout = layout_of(tensor, name)
    mesh = tensor.device_mesh
    group = group_of(mesh)
    if dist.get_process_group_ranks(group) != mesh.mesh.flatten().tolist():
        raise SecateurError(f"{name}: the mesh {mesh} orders its ranks otherwise than its process group")
    me = dist.get_rank(group)
    local = tensor.to_local().detach().contiguous()
    before, after = layout.ranges(tensor.shape[0]), layout.ranges(len(index))
    wanted = [index[rows.start : rows.stop] for rows in after]
    sent = [wanted[0][:0]] * len(before)
    places = list(sent)
    for other in layout.partners(me):
        sent[other] = wanted[other][_within(wanted[other], before[me])] - before[me].start
        places[other] = _within(wanted[me], before[other]).nonzero().flatten()
    outgoing = local.index_select(0, torch.cat(sent).to(local.device))
    incoming = local.new_empty((len(wanted[me]), *local.shape[1:]))
    dist.all_to_all_single(incoming, outgoing, list(map(len, places)), list(map(len, sent)), group=group)
    result = torch.empty_like(incoming)
    result[torch.cat(places).to(local.device)] = incoming
    return result


def _within(rows: Tensor, held: range) -> Tensor:
    return (rows >= held.start) & (rows < held.stop)


def group_of(mesh: Any) -> Any:
    """The process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.mesh.flatten().tolist() == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return mesh._flatten().get_group()
