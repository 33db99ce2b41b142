"""Refuse jobs of several processes, which this release does not synchronise."""

from __future__ import annotations

import os

import torch.distributed

from secateur.errors import SecateurError


def refuse_several_processes() -> None:
    """Raise when this process is one of several of a training job.

    A replaced parameter under DistributedDataParallel silently drops out of the gradient reduction, so the ranks
    would drift apart without an error.

    Raises:
        SecateurError: WORLD_SIZE or the initialised process group says there are several.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdigit():
        raise SecateurError(f"WORLD_SIZE is {given!r}, expected a number of processes")
    size = int(given)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = max(size, torch.distributed.get_world_size())
    if size > 1:
        raise SecateurError(
            f"started with {size} processes: expected 1. Pruning in a job of several processes is not supported yet "
            "(parameters replaced under DDP or FSDP would no longer be synchronised)"
        )
