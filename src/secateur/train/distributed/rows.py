"""Which rank holds which rows of a sharded tensor, and how rows change hands.

A rank's rows are one contiguous range: every mesh dimension that shards axis 0 cuts the range into chunks, as
`torch.chunk` does. Legend: N rows of the whole tensor, M ranks of its mesh.
"""

from __future__ import annotations

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

    def ranges(self, num_rows: int, *, without: Sequence[int] = ()) -> list[range]:
        """(M,) the rows of each rank, in the mesh's own order; dimensions `without` are taken as not sharded."""
        ranges = []
        for coordinate in _coordinates(self.mesh_shape):
            rows = range(num_rows)
            for dim in self.cuts:
                if dim not in without:
                    rows = _chunk(rows, self.mesh_shape[dim], coordinate[dim])
            ranges.append(rows)
        return ranges

    def sources(self, have: Sequence[range], want: Sequence[Sequence[int]]) -> list[list[int]]:
        """(M, wanted rows) for each rank the rank that gives it each row: itself if it can, else the nearest copy."""
        coordinates = _coordinates(self.mesh_shape)
        copies = [dim for dim in range(len(self.mesh_shape)) if dim not in self.cuts]
        result = []
        for me, rows in enumerate(want):
            near = sorted(
                range(len(have)),
                key=lambda other: (other != me, sum(coordinates[other][d] != coordinates[me][d] for d in copies)),
            )
            result.append([next(rank for rank in near if row in have[rank]) for row in rows])
        return result


def layout_of(tensor: DTensor, name: str) -> RowLayout:
    """How the rows of a DTensor lie.

    Raises:
        SecateurError: it is sharded otherwise than by whole rows on axis 0 and by other axes.
    """
    plain, strided = [], []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise SecateurError(f"{name}: placements {tensor.placements}, expected sharded or replicated ones")
        if isinstance(placement, _StridedShard) and placement.dim == 0:
            strided.append(dim)  # FSDP's own cut of what model parallelism had cut before
        elif isinstance(placement, Shard) and placement.dim == 0:
            plain.append(dim)
    if len(plain) > 1 or len(strided) > 1:
        raise SecateurError(f"{name}: placements {tensor.placements}, expected at most one plain and one strided cut")
    return RowLayout(mesh_shape=tuple(tensor.device_mesh.shape), cuts=(*plain, *strided))


def fetch_rows(tensor: DTensor, layout: RowLayout, want: Sequence[Sequence[int]]) -> Tensor:
    """The rows of a DTensor that this rank wants, from the ranks that hold them; all ranks of its mesh must call.

    Args:
        tensor: (N, ...). layout: of it. want: (M, rows) what each rank wants, in the mesh's order.

    Returns:
        (wanted rows, ...) a plain tensor; other axes as they are on this rank.
    """
    mesh = tensor.device_mesh
    local = tensor.to_local().detach().contiguous()
    have = layout.ranges(tensor.shape[0])
    sources = layout.sources(have, want)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    me = _coordinates(layout.mesh_shape).index(tuple(coordinate))
    sent = [
        [row for row, source in zip(rows, sources[rank], strict=True) if source == me] for rank, rows in enumerate(want)
    ]
    arriving = sorted(range(len(want[me])), key=lambda place: sources[me][place])  # stable: by sender, then as wanted
    index = torch.tensor([row - have[me].start for rows in sent for row in rows], dtype=torch.int64)
    outgoing = local.index_select(0, index.to(local.device))
    incoming = local.new_empty((len(arriving), *local.shape[1:]))
    group, members = _group(mesh)
    splits_out = [0] * len(members)
    splits_in = [0] * len(members)
    for rank, global_rank in enumerate(members):
        place = dist.get_group_rank(group, global_rank)
        if place != rank:
            raise SecateurError(f"the mesh {mesh} orders its ranks otherwise than its process group")
        splits_out[rank] = len(sent[rank])
        splits_in[rank] = sources[me].count(rank)
    dist.all_to_all_single(incoming, outgoing, splits_in, splits_out, group=group)
    result = torch.empty_like(incoming)
    result[torch.tensor(arriving, dtype=torch.int64, device=local.device)] = incoming
    return result


def _group(mesh: Any) -> tuple[Any, list[int]]:
    """The process group of all ranks of a mesh, and those ranks in the mesh's order."""
    members = mesh.mesh.flatten().tolist()
    if mesh.ndim == 1:
        return mesh.get_group(), members
    if members == list(range(dist.get_world_size())):
        return dist.group.WORLD, members
    return mesh._flatten().get_group(), members


def _coordinates(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Every coordinate of a mesh of this shape, in row-major order."""
    coordinates: list[tuple[int, ...]] = [()]
    for size in shape:
        coordinates = [(*head, index) for head in coordinates for index in range(size)]
    return coordinates


def _chunk(rows: range, num_chunks: int, index: int) -> range:
    """`torch.chunk`'s part `index` of a range; empty where there are fewer parts."""
    size = -(-len(rows) // num_chunks)
    return rows[index * size : (index + 1) * size]
