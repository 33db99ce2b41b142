"""Write a changed checkpoint piece by piece: no more than one file's worth of it is ever in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from secateur.files.atomic import fsync_file
from secateur.files.progress import OnChunk
from secateur.files.refused import refused_by_the_disk
from secateur.files.safetensors_header import sort_metadata_in
from secateur.training_checkpoint.changes import Change
from secateur.training_checkpoint.pieces import Piece, files, new_rows, new_shape, pieces
from secateur.training_checkpoint.rows import read_bytes
from secateur.training_checkpoint.stored import StoredCheckpoint

FILE_BYTES = 256 * 2**20  # of a file, unless one row of a tensor is larger


class _Planner(DefaultSavePlanner):
    """Gives a writer the data of an item when it is asked for, and not before."""

    def __init__(self, resolve: Callable[[MetadataIndex], Tensor | io.BytesIO]) -> None:
        super().__init__()
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._resolve(write_item.index)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # not the folder's name: it is renamed when it is whole


def write_dcp(
    stored: StoredCheckpoint,
    changes: Mapping[str, Change],
    folder: Path,
    on_chunk: OnChunk = lambda _: None,
) -> None:
    """A torch.distributed.checkpoint folder of the changed tensors and of all other entries as they are.

    torch's writer keeps what it wrote until a file is closed. So it is told that as many ranks save as there are files,
    and is given one rank's plan after another.

    Raises:
        OSError: the disk refused. SecateurError: a source file does not hold what it says.
    """
    parts = {
        MetadataIndex(name, piece.offsets, number): piece
        for name, tensor in stored.tensors.items()
        for number, piece in enumerate(pieces(tensor, new_shape(tensor, changes), FILE_BYTES))
    }
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype, requires_grad=tensor.requires_grad),
            size=torch.Size(new_shape(tensor, changes)),
            chunks=[],
        )
        for name, tensor in stored.tensors.items()
    }
    items: dict[Piece, WriteItem] = {}
    for index, piece in parts.items():
        about = described[piece.name]
        assert isinstance(about, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
        about.chunks.append(chunk)
        data = TensorWriteData(chunk=chunk, properties=about.properties, size=about.size)
        items[piece] = WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)
    described |= {name: BytesStorageMetadata() for name in stored.blobs}

    def resolve(index: MetadataIndex) -> Tensor | io.BytesIO:
        if index.fqn in stored.blobs:
            on_chunk(stored.blobs[index.fqn].length)
            return io.BytesIO(read_bytes(stored.blobs[index.fqn]))
        on_chunk(parts[index].num_bytes)
        return new_rows(stored.tensors[index.fqn], changes.get(index.fqn), parts[index])

    # copy ahead 0: on a machine with a GPU the writer would otherwise fetch tensors ahead of writing them
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    plans = [SavePlan([items[piece] for piece in group]) for group in files(items, FILE_BYTES)]
    if stored.blobs:
        opaque = [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in stored.blobs]
        plans.insert(0, SavePlan(opaque))
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(plans[0])
    planner = _Planner(resolve)
    paths = None if stored.paths is None else dict(stored.paths)
    with refused_by_the_disk(folder):
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        writer.finish(Metadata(state_dict_metadata=described, planner_data=paths), results)


def write_shards(
    stored: StoredCheckpoint,
    changes: Mapping[str, Change],
    folder: Path,
    on_chunk: OnChunk = lambda _: None,
) -> None:
    """The same as files of transformers' distributed save, one for each rank that there might have been.

    Raises:
        OSError: the disk refused. SecateurError: a source file does not hold what it says.
    """
    parts = (
        piece for tensor in stored.tensors.values() for piece in pieces(tensor, new_shape(tensor, changes), FILE_BYTES)
    )
    for rank, group in enumerate(files(parts, FILE_BYTES), start=1):
        tensors = {piece.name: new_rows(stored.tensors[piece.name], changes.get(piece.name), piece) for piece in group}
        offsets = {piece.name: {"saved_offsets": piece.offsets} for piece in group}
        path = folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        with refused_by_the_disk(path):
            save_file(tensors, path, metadata=about)
            sort_metadata_in(path)
        fsync_file(path)
        on_chunk(sum(piece.num_bytes for piece in group))
