"""One training job, whatever its kind: a single process, copies under DDP, or shards under FSDP2 and EP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import SecateurError
from secateur.expert_axis import is_sharded
from secateur.families import MoEModel, bits_sum, tensor_at
from secateur.plans import Plan
from secateur.stats import RouterStats
from secateur.surgery.module import prune_model_
from secateur.surgery.optimizer import Optimizers
from secateur.train.distributed.ddp import DDPFinder, rebuild_ddp_
from secateur.train.distributed.fsdp import check_fsdp, reshard_
from secateur.train.distributed.ranks import Ranks
from secateur.train.distributed.rows import group_of
from secateur.train.distributed.surgery import check_expert_parallel, prune_sharded_model_


class Job:
    """What LAEP needs from the processes that train one model together.

    Attributes:
        ranks: see `Ranks`.

    Raises:
        SecateurError: the model is wrapped or split in a way that pruning cannot follow.
    """

    def __init__(self, moe: MoEModel) -> None:
        model = moe.model
        reshard_(model)  # a forward pass before may have left shards gathered
        check_fsdp(model)
        self.ranks = Ranks(model)
        if self.ranks.ep_size > 1:
            check_expert_parallel(moe)
        self.device = next(model.parameters()).device
        copies = self.ranks.size > 1 and not self.ranks.sharded
        self._finder = DDPFinder(model) if copies else None

    def detach(self) -> None:
        """Remove all hooks from the model."""
        if self._finder is not None:
            self._finder.detach()

    def calls(self, name: str) -> None:
        """What a rank that waits will say that all must call."""
        self.ranks.call = name

    def check_running(self) -> None:
        """Call after an optimizer step: what a pruning will need of the training loop is there.

        Raises:
            SecateurError: the process group was made after this object; see also `DDPFinder.ready`.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.ranks.size:
            raise SecateurError(
                f"found {dist.get_world_size()} processes in the job, but {self.ranks.size} when LAEP was made; "
                "make it after torch.distributed.init_process_group"
            )
        if self._finder is not None:
            self._finder.ready()

    def sum(self, stats: RouterStats) -> RouterStats:
        """The statistics of all ranks with other tokens; all ranks must call."""
        return self.ranks.sum(stats, self.device)

    def sum_counts(self, counts: Tensor) -> Tensor:
        """The same for one tensor of counts, in place."""
        return self.ranks.sum_counts(counts)

    def agreed(self, plan: Plan) -> Plan:
        """Rank 0's plan, which every rank must have made too.

        Raises:
            SecateurError: on all ranks, when one has another.
        """
        if self.ranks.size == 1:
            return plan
        return Plan.from_json(self.ranks.agree_json("plan", plan.to_json(), self.device))

    def largest(self, value: float) -> float:
        """The largest of all ranks' values; NaN if any is."""
        return self.ranks.largest(value, self.device)

    def on_any_rank(self, flag: bool) -> bool:
        """Whether it is set on any rank; in the host's memory where the process group can, so that none waits."""
        if self.ranks.size == 1:
            return flag
        device = torch.device("cpu") if "cpu:" in dist.get_backend_config() else self.device
        return self.ranks.largest(float(flag), device) > 0

    def prune_(self, moe: MoEModel, plan: Plan, optimizer: Optimizers | None) -> MoEModel:
        """Apply a plan on all ranks, in place; what wraps the model goes on working.

        Raises:
            SecateurError: see `prune_model_`, `prune_sharded_model_` and `DDPFinder.ready`.
        """
        if self.ranks.sharded:
            return prune_sharded_model_(moe, plan, optimizer)
        wrapper = self._finder.ready() if self._finder else None
        pruned = prune_model_(moe, plan, optimizer)
        if wrapper is not None:
            rebuild_ddp_(wrapper)
        return pruned

    def prune_copy_(self, moe: MoEModel, plan: Plan) -> MoEModel:
        """Apply a plan to another model of the same kind, which no optimizer trains."""
        return (prune_sharded_model_ if self.ranks.sharded else prune_model_)(moe, plan)

    def checksums(self, moe: MoEModel) -> dict[str, int]:
        """{tensor with an expert axis: the sum of its bits}, of the whole tensors on every kind of job."""
        reshard_(moe.model)
        names = [spec.name for block in moe.blocks.values() for spec in block.tensors]
        tensors: list[Any] = [tensor_at(moe.model, name) for name in names]
        sums = torch.tensor(list(map(_own_bits, tensors)), dtype=torch.int64, device=self.device)
        meshes = [tensor.device_mesh if is_sharded(tensor) else None for tensor in tensors]
        for mesh in dict.fromkeys(meshes):  # a mesh may be a part of the job, beside others with the same shards
            if mesh is not None:
                on_mesh = torch.tensor([other == mesh for other in meshes], device=self.device)
                parts = sums[on_mesh]
                with self.ranks.told():
                    dist.all_reduce(parts, group=group_of(mesh))
                sums[on_mesh] = parts
        return dict(zip(names, sums.tolist(), strict=True))


def _own_bits(tensor: Any) -> int:
    """The sum of the bits of this rank's part; of several copies of a part, only the first counts."""
    if not is_sharded(tensor):
        return bits_sum(tensor)
    coordinate = tensor.device_mesh.get_coordinate()
    is_first_copy = all(
        place == 0 or not placement.is_replicate()
        for place, placement in zip(coordinate, tensor.placements, strict=True)
    )
    return bits_sum(tensor.to_local().contiguous()) if is_first_copy else 0
