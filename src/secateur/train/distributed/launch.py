"""A job of several processes, as torchrun starts it: joining it, and doing things once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from secateur.errors import SecateurError, causes_of
from secateur.train.distributed.ranks import broadcast_text

# what gloo puts into the text of its errors, which are plain RuntimeErrors
GLOO = "gloo/transport"


def world_size() -> int:
    """Processes of this job: 1 without torchrun.

    Raises:
        SecateurError: WORLD_SIZE is not a number.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdigit() or int(given) < 1:
        raise SecateurError(f"WORLD_SIZE is {given!r}, expected a number of processes")
    return max(int(given), dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)


def rank() -> int:
    """The number of this process in its job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def is_main() -> bool:
    """Whether this process is the one that writes what is written once."""
    return rank() == 0


def was_restarted() -> bool:
    """Whether torchrun started this job again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def join() -> None:
    """Meet the other processes: NCCL where there are GPUs, else gloo. Does nothing in a job of one, or a second time.

    Raises:
        SecateurError: the other processes cannot be reached.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(_attempt(), store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise SecateurError(f"cannot meet the other processes of the job (started by torchrun?): {error}") from None


def _attempt() -> str:
    """What tells the keys of this try from those of earlier ones, which torchrun's store still holds.

    Without it a process may read where another one listened before the restart (pytorch issue 135712). Only the
    processes of one node are sure to agree on it; docs/devices.md says what to do on several.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 'any'}"


def leave() -> None:
    """Take leave of the others, so that the process can end; after an error it must just end.

    The last message is one without tensors: a thread of gloo that lets go of one while Python ends aborts the process.
    """
    barrier()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether it is set on any rank; all ranks must call. In the host's memory, so that none waits for its GPU."""
    return any(values_of_ranks(float(flag)))


def values_of_ranks(value: float) -> list[float]:
    """The value of every rank, by their numbers; all ranks must call."""
    if world_size() == 1:
        return [value]
    values = torch.empty(world_size(), dtype=torch.float64)
    dist.all_gather_into_tensor(values, torch.tensor([value], dtype=torch.float64))
    return [float(one) for one in values]


def has_lost_contact(error: BaseException) -> bool:
    """Whether an error, or what it was made from, is that another process of the job cannot be reached."""
    return any(
        isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and GLOO in str(cause))
        for cause in causes_of(error)
    )


def once(action: Callable[[], Any]) -> Any:
    """Rank 0's result of `action` (JSON values), on every rank; the others wait for it."""
    if world_size() == 1:
        return action()
    device = torch.device("cpu")  # gloo carries it on every machine
    result = json.dumps(action()) if is_main() else ""
    return json.loads(broadcast_text(result, device))
