"""The processes of a training job as pruning sees them: who holds other tokens, and one decision for all.

Statistics are summed over the ranks that see different tokens; the ranks of a tensor-parallel group see the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.expert_axis import is_sharded
from secateur.stats import LayerStats, RouterStats
from secateur.train.distributed.fsdp import check_only_fsdp
from secateur.train.distributed.patience import told_when_long
from secateur.train.distributed.rows import group_of


class Ranks:
    """The ranks that train one model together.

    Attributes:
        size, rank: of the whole job. ep_size: ranks that share the experts of a layer, 1 without expert parallelism.
        sharded: whether transformers or FSDP2 split the parameters; else several ranks hold copies (DDP).
        call: the name of the public call that is at work, for the line of a rank that waits.
    """

    call = "LAEP"

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            SecateurError: the model is split in a way that pruning cannot follow.
        """
        several = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self.ep_size = 1
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self._data_group: Any = None  # None: the whole job
        config = getattr(getattr(model, "config", None), "distributed_config", None)
        meshes: Any = getattr(model, "_mesh_manager", None)
        if config is None or meshes is None:
            check_only_fsdp(model)
            return
        if config.pp_size > 1:
            raise SecateurError(f"pipeline parallelism (pp_size {config.pp_size}) cannot be pruned while it trains")
        self.ep_size = config.ep_size
        if config.tp_size > 1:
            self._data_group = group_of(meshes.get_mesh(("dp_replicate", "fsdp")))

    @property
    def carries(self) -> bool:
        """Whether this rank is the first of those whose statistics are summed with its own."""
        return self.size == 1 or dist.get_rank(self._data_group) == 0

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Around what waits for other ranks."""
        return told_when_long(self.call, self.rank, self.size)

    def sum(self, stats: RouterStats, device: torch.device) -> RouterStats:
        """The statistics of all ranks with other tokens added up; every rank gets the same.

        Args:
            device: of the model, where the process group's backend can reduce.
        """
        if self.size == 1:
            return stats
        rows = [
            torch.cat((torch.tensor([layer_stats.num_tokens]), layer_stats.token_count))
            for layer_stats in stats.layers.values()
        ]
        total = torch.cat(rows).to(device)
        with self.told():
            dist.all_reduce(total, group=self._data_group)
            total = total.cpu()
        parts = torch.split(total, [len(row) for row in rows])
        return RouterStats(
            layers={
                layer: LayerStats(num_tokens=int(part[0]), token_count=part[1:])
                for layer, part in zip(stats.layers, parts, strict=True)
            }
        )

    def sum_counts(self, counts: Tensor) -> Tensor:
        """One tensor added up over the ranks with other tokens, in place."""
        if self.size > 1:
            dist.all_reduce(counts, group=self._data_group)
        return counts

    def largest(self, value: float, device: torch.device) -> float:
        """The largest of the ranks' values, NaN if any is."""
        if self.size == 1:
            return value
        values = torch.empty(self.size, dtype=torch.float64, device=device)
        with self.told():
            dist.all_gather_into_tensor(values, torch.tensor([value], dtype=torch.float64, device=device))
            return float(values.max())  # which is NaN when one is

    def agree_json(self, what: str, value: Any, device: torch.device) -> Any:
        """Rank 0's `value` (JSON), after a comparison of its digest with every rank's own.

        Raises:
            SecateurError: on every rank alike, names the ranks whose value is another.
        """
        text = json.dumps(value, sort_keys=True)
        mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(device)
        digests = torch.empty(self.size * len(mine), dtype=torch.uint8, device=device)
        with self.told():
            dist.all_gather_into_tensor(digests, mine)
            rows = digests.cpu().view(self.size, -1)
        wrong = [rank for rank in range(self.size) if not torch.equal(rows[rank], rows[0])]
        if wrong:
            raise SecateurError(
                f"{what}: ranks {wrong} of {self.size} disagree with rank 0, nothing was changed; all ranks must run "
                "the same settings on the same versions"
            )
        return json.loads(broadcast_text(text, device))


def broadcast_text(text: str, device: torch.device) -> str:
    """Rank 0's `text`, on every rank."""
    is_source = dist.get_rank() == 0
    content = text.encode()
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, src=0)
    data = torch.tensor(list(content), dtype=torch.uint8) if is_source else torch.empty(int(length), dtype=torch.uint8)
    data = data.to(device)
    dist.broadcast(data, src=0)
    return bytes(data.cpu().tolist()).decode()
