"""Load a model as shards on the ranks of a job, by transformers' own distributed layer, and see that it is sharded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers.distributed.configuration_utils import DistributedConfig

from secateur.errors import SecateurError
from secateur.expert_axis import is_sharded
from secateur.families import MoEModel
from secateur.train.distributed.launch import world_size


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How a job of W processes splits a model: W = fsdp * tp.

    fsdp: ranks that see different tokens and share the parameters. ep: ranks that share the experts of a layer; a
    multiple of tp and a divisor of W. tp: ranks that see the same tokens and share the matrices.
    """

    fsdp: int
    ep: int
    tp: int

    @property
    def is_sharded(self) -> bool:
        return self.fsdp * self.tp > 1

    def config(self) -> Any:
        """transformers' DistributedConfig."""
        return DistributedConfig(fsdp_size=self.fsdp, ep_size=self.ep, tp_size=self.tp)


def parallel_sizes(fsdp: int | None, ep: int, tp: int, *, processes: int | None = None) -> ParallelSizes:
    """The sizes for a number of processes, by default those of this job.

    Args:
        fsdp: None for all the processes that `tp` leaves.

    Raises:
        SecateurError: they do not multiply to the number of processes, or the expert-parallel size does not fit.
    """
    processes = world_size() if processes is None else processes
    needed = fewest_processes(fsdp, ep, tp)
    found = f"found {processes} process{'es' if processes > 1 else ''}"
    start = f"start the job by `torchrun --nproc-per-node {needed} -m secateur ...`"
    if fsdp is not None and fsdp * tp != processes:
        raise SecateurError(f"--fsdp {fsdp} x --tp {tp}: expected {fsdp * tp} processes, {found}; {start}")
    for flag, size in (("tp", tp), ("ep", ep)):
        if processes % size:
            raise SecateurError(f"--{flag} {size}: expected a multiple of {size} processes, {found}; {start}")
    if ep > 1 and ep % tp:
        raise SecateurError(f"--ep {ep}: expected a multiple of --tp {tp}, or 1")
    return ParallelSizes(fsdp=processes // tp, ep=ep, tp=tp)


def fewest_processes(fsdp: int | None, ep: int, tp: int) -> int:
    """The smallest job that these sizes can be for."""
    return fsdp * tp if fsdp is not None else math.lcm(ep, tp)


def check_split(moe: MoEModel, sizes: ParallelSizes) -> None:
    """
    Raises:
        SecateurError: transformers has no plan to split this family that way, or heads or experts do not divide.
    """
    config: Any = moe.model.config
    for flag, size in (("ep", sizes.ep), ("tp", sizes.tp), ("fsdp", sizes.fsdp)):
        if size > 1 and not getattr(config, f"base_model_{flag}_plan", None):
            raise SecateurError(
                f"--{flag} {size}: transformers has no {flag} plan for model type {config.model_type!r}"
            )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name, 0) % sizes.tp:
            raise SecateurError(f"--tp {sizes.tp}: {name} is {getattr(config, name)}, expected a multiple")
    for layer, count in moe.counts.items():
        if count % sizes.ep:
            raise SecateurError(f"--ep {sizes.ep}: layer {layer} has {count} experts, expected a multiple")


def check_sharded(moe: MoEModel, sizes: ParallelSizes) -> None:
    """See by the shapes on this rank that the experts are really split, since a plan that matches nothing is silent.

    Raises:
        SecateurError: names the tensor, its whole shape and what this rank holds of it.
    """
    copies = sizes.fsdp * sizes.tp // sizes.ep if sizes.ep > 1 else sizes.fsdp  # FSDP's cut of what EP has cut
    for block in moe.blocks.values():
        parameter: Any
        for name, parameter in block.experts.named_parameters():
            local = parameter.to_local() if is_sharded(parameter) else parameter
            rows = parameter.shape[0]
            most = -(-(rows // sizes.ep) // copies)
            if local.numel() * rows > parameter.numel() * most:
                raise SecateurError(
                    f"{block.name}.experts.{name} of shape {tuple(parameter.shape)}: this rank holds "
                    f"{tuple(local.shape)}, so it is not split over fsdp {sizes.fsdp}, ep {sizes.ep}, tp {sizes.tp}"
                )
