"""Write a sharded model rank by rank, as transformers' `from_pretrained` loads it onto any number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import is_initialized
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from secateur.families import plain_class
from secateur.train.distributed.launch import barrier, is_main


def save_sharded(model: Any, folder: Path) -> None:
    """Safetensors of this rank's shards, and the config; all ranks must call.

    The same files as `save_pretrained(folder, distributed_checkpoint=True)`, which cannot write tied weights again
    once they were loaded from such files (their shards share memory, and safetensors refuses that).

    Raises:
        OSError: a rank could not write; on every rank.
    """
    if is_main():
        _write_config(model, folder)
    barrier()
    with failures_as(OSError, str(folder)):
        save(_writable(model), storage_writer=_writer(folder))


def save_for_ranks(model: Any, folder: Path) -> None:
    """The same files from a whole model, by one rank alone.

    (An ordinary checkpoint would do, but transformers merges its per-expert tensors rank by rank and fails on a rank
    that gets none.)

    Raises:
        OSError: it could not be written.
    """
    _write_config(model, folder)
    with failures_as(OSError, str(folder)):
        save(_writable(model), storage_writer=_writer(folder), no_dist=True)


def save_whole(model: Any, folder: Path) -> None:
    """`save_pretrained`, all ranks calling: the shards are gathered on rank 0, which writes an ordinary model.

    (Gathered, tied weights no longer share memory, by which transformers would know that one of them is enough.)
    """
    gather = model.gather_sharded_state_dict_for_save

    def gather_once(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tied = getattr(model, "all_tied_weights_keys", {})
        return {name: value for name, value in gather(*args, **kwargs).items() if name not in tied}

    model.gather_sharded_state_dict_for_save = gather_once
    try:
        model.save_pretrained(folder)
    finally:
        del model.gather_sharded_state_dict_for_save


@contextlib.contextmanager
def failures_as(kind: type[Exception], what: str) -> Iterator[None]:
    """Make an ordinary exception of a CheckpointException, which is none; it comes on every rank when one fails."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError) and cause.errno is not None and not is_initialized():  # one rank
            raise OSError(cause.errno, cause.strerror, cause.filename or what) from error
        raise kind(f"{what}: rank {rank}: {cause}") from error


def _write_config(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [plain_class(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():  # else a resumed run would make another one of the config
        model.generation_config.save_pretrained(folder)


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(path=str(folder), save_distributed=True, enable_consolidation=False)


def _writable(model: nn.Module) -> dict[str, Any]:
    """The model's state with every tensor in memory of its own and in contiguous shards, which is all DCP can write."""
    seen: set[int] = set()
    state = {}
    value: Any
    for name, value in get_model_state_dict(model).items():
        if isinstance(value, DTensor):
            placements = [
                Shard(placement.dim) if isinstance(placement, _StridedShard) else placement
                for placement in value.placements
            ]
            value = value.redistribute(placements=placements)
        place = (value.to_local() if isinstance(value, DTensor) else value).data_ptr()
        state[name] = torch.clone(value) if place in seen else value
        seen.add(place)
    return state
