"""The sums of one layer while it is observed: filled on the device, by the rows of `stats.SUMS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.stats import SUMS, LayerStats, Seen
from secateur.stats.sums import ByCall, ByRouter, BySlot


def _add_rows(total: Tensor, experts: Tensor, rows: Tensor) -> None:
    total.index_add_(0, experts, rows)


def _largest_rows(total: Tensor, experts: Tensor, rows: Tensor) -> None:
    index = experts.view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
    total.scatter_reduce_(0, index, rows, "amax")


# how a sum merges -> what brings numbers of token-slots into the rows of their experts
INTO_ROWS: dict[Callable[..., Tensor], Callable[[Tensor, Tensor, Tensor], None]] = {
    torch.add: _add_rows,
    torch.maximum: _largest_rows,
}


class RunningSums:
    """The accumulators of one layer. Where a sum is by token-slot, the row after the last expert takes padding."""

    def __init__(self, names: Iterable[str], num_experts: int) -> None:
        """
        Args:
            names: in SUMS.
        """
        self._rows = [SUMS[name] for name in names]
        self._num_experts = num_experts
        self._num_tokens: Tensor | None = None
        self._count: Tensor | None = None
        self._num_routed: Tensor | None = None  # tokens in the inputs of the router
        self._totals: dict[str, Tensor] = {}

    def add_call(self, seen: Seen, keep: Tensor | None) -> None:
        """A call of the experts; keep (T,) is False for padding."""
        device = seen.experts.device
        if self._num_tokens is None or self._count is None:
            self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
            self._count = torch.zeros(self._num_experts + 1, dtype=torch.int64, device=device)
        self._num_tokens += len(seen.inputs) if keep is None else keep.sum()
        self._count.scatter_add_(0, seen.experts, torch.ones_like(seen.experts))
        for row in self._rows:
            if isinstance(row.measure, BySlot):
                values = row.measure.of(seen)
                if row.name not in self._totals:
                    self._totals[row.name] = values.new_zeros(self._num_experts + 1, *values.shape[1:])
                INTO_ROWS[row.merge](self._totals[row.name], seen.experts, values)
            elif isinstance(row.measure, ByCall):
                self._merge(row.name, row.measure.of(seen))

    def add_router_call(self, tokens: Tensor, keep: Tensor | None) -> None:
        """A call of the router; tokens (T, D), keep (T,) False for padding."""
        tokens = tokens.double()
        if keep is not None:
            tokens = tokens.masked_fill(~keep[:, None], 0)
        if self._num_routed is None:
            self._num_routed = torch.zeros((), dtype=torch.int64, device=tokens.device)
        self._num_routed += len(tokens) if keep is None else keep.sum()
        for row in self._rows:
            if isinstance(row.measure, ByRouter):
                self._merge(row.name, row.measure.of(tokens))

    @property
    def is_empty(self) -> bool:
        return self._count is None

    def read(self, routed: int | None = None) -> LayerStats:
        """The statistics so far.

        Args:
            routed: tokens that the router saw, where the experts are called with less than all.

        Raises:
            SecateurError: no call was added; the router was not called with every token; a number that is not finite.
        """
        if self._num_tokens is None or self._count is None:
            raise SecateurError("no call was observed")
        num_tokens = int(self._num_tokens) if routed is None else routed
        sums = {}
        for row in self._rows:
            is_of_router = isinstance(row.measure, ByRouter)
            if is_of_router and (self._num_routed is None or int(self._num_routed) != num_tokens):
                seen = 0 if self._num_routed is None else int(self._num_routed)
                raise SecateurError(
                    f"{row.name}: the router was called as a module with {seen} of {num_tokens} tokens, so what it is "
                    "given cannot be observed"
                )
            total = self._totals[row.name]
            sums[row.name] = total[:-1] if isinstance(row.measure, BySlot) else total
        return LayerStats(num_tokens=num_tokens, token_count=self._count[:-1], **sums)

    def _merge(self, name: str, value: Tensor) -> None:
        self._totals[name] = SUMS[name].merge(self._totals[name], value) if name in self._totals else value
