"""Gather a tensor along its expert axis. The only code of Secateur that indexes an expert axis.

Shapes: E experts before, N experts after, r rows per expert, t trailing rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.errors import SecateurError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from secateur.plans import LayerPlan

# A name like this belongs to an expert or a router, so a rule must say what to do with it.
SUSPICIOUS = re.compile(r"expert|router|score_correction|(?:^|\.)(?:gate|moe)(?:\.|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ExpertAxis:
    """Where the experts lie in a tensor: axis `dim` has E * rows_per_expert + num_trailing entries.

    dim: the expert axis, counted from the front (0, 1, ...), so that it names the same axis in an optimizer state.
    rows_per_expert: 1 for a stacked tensor (E, ...); r where the r rows of each expert share one axis (E * r, ...).
    num_trailing: entries after those of the last expert that belong to no routed expert (zero experts); always kept.

    Raises SecateurError when dim or num_trailing is negative or rows_per_expert is below 1; whoever knows the tensor
    puts its name in front.
    """

    dim: int
    rows_per_expert: int = 1
    num_trailing: int = 0

    def __post_init__(self) -> None:
        for field, least in (("dim", 0), ("rows_per_expert", 1), ("num_trailing", 0)):
            value = getattr(self, field)
            if value < least:
                raise SecateurError(f"{field} is {value}, expected at least {least}")

    def size(self, num_experts: int) -> int:
        """Entries along `dim` for this many experts: num_experts * rows_per_expert + num_trailing."""
        return num_experts * self.rows_per_expert + self.num_trailing

    def resized(self, shape: Sequence[int], num_experts: int) -> tuple[int, ...]:
        """The shape of a tensor with this many experts, from that of the same tensor with another number of them."""
        return (*shape[: self.dim], self.size(num_experts), *shape[self.dim + 1 :])

    def rows(self, order: Sequence[int], num_experts: int) -> list[range]:
        """Entries along `dim` to take for order[new] = old: those of each new expert, then the trailing ones, if any.

        Raises SecateurError when order is empty, repeats an expert or names one outside 0..num_experts-1.
        """
        if len(order) == 0:
            raise SecateurError("the order is empty, expected at least one expert to stay")
        for expert in order:
            if not isinstance(expert, int) or not 0 <= expert < num_experts:
                raise SecateurError(f"the order names expert {expert!r}, expected 0..{num_experts - 1}")
        if len(set(order)) != len(order):
            repeated = sorted({expert for expert in order if order.count(expert) > 1})
            raise SecateurError(f"the order names experts {repeated} more than once, expected once")
        each, end = self.rows_per_expert, num_experts * self.rows_per_expert
        trailing = [range(end, end + self.num_trailing)] if self.num_trailing else []
        return [*(range(expert * each, (expert + 1) * each) for expert in order), *trailing]


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """A tensor with experts in it. name: for messages. axis: where they lie."""

    name: str
    axis: ExpertAxis

    def rows(self, order: Sequence[int], num_experts: int) -> list[range]:
        """`ExpertAxis.rows`, with the name in front of its errors."""
        try:
            return self.axis.rows(order, num_experts)
        except SecateurError as error:
            raise SecateurError(f"{self.name}: {error}") from error


def row_index(layer_plan: LayerPlan, spec: ExpertTensor, device: torch.device | str | None = None) -> Tensor:
    """The rows of the plan's order as an index, int64 (N * r + t,).

    Raises SecateurError when the order does not fit (see `ExpertAxis.rows`), or the plan mixes or thins experts: these
    are not rows of the tensor.
    """
    import torch  # here: headers are checked against an axis without it

    if not layer_plan.is_copy:
        raise SecateurError(f"{spec.name}: the plan mixes or thins experts, expected one that takes them as they are")
    rows = spec.rows(layer_plan.order, layer_plan.experts_before)
    return torch.cat([torch.arange(one.start, one.stop) for one in rows]).to(device)


def check_axis(shape: Sequence[int], spec: ExpertTensor, num_experts: int) -> None:
    """Raise SecateurError unless a tensor of this shape can hold num_experts experts as `spec` says."""
    axis = spec.axis
    expected = axis.size(num_experts)
    if axis.dim >= len(shape):
        raise SecateurError(f"{spec.name}: shape {tuple(shape)} has no axis {axis.dim}, expected one of {expected}")
    if shape[axis.dim] != expected:
        raise SecateurError(
            f"{spec.name}: axis {axis.dim} of shape {tuple(shape)} has {shape[axis.dim]} entries, expected {expected}"
            f" ({num_experts} experts x {axis.rows_per_expert} rows + {axis.num_trailing} trailing)"
        )


def gather(tensor: Tensor, spec: ExpertTensor, layer_plan: LayerPlan) -> Tensor:
    """The experts of `tensor` in the order of the plan, trailing rows kept.

    tensor: axis spec.axis.dim has E * r + t entries; any dtype, any device.
    Returns a contiguous tensor with storage of its own, same dtype and device, outside autograd, in which that axis
    has N * r + t entries.
    Raises SecateurError when the axis has another size or the plan does not fit (see row_index).
    """
    check_axis(tensor.shape, spec, layer_plan.experts_before)
    return tensor.detach().index_select(spec.axis.dim, row_index(layer_plan, spec, tensor.device))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, told without loading torch.distributed."""
    return hasattr(tensor, "device_mesh")
