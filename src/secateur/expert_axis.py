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

# A name like this belongs to an expert or a router, so a rule must say what to do with it.
SUSPICIOUS = re.compile(r"expert|router|score_correction|(?:^|\.)(?:gate|moe)(?:\.|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """Where the experts lie in one tensor: axis `dim` has E * rows_per_expert + num_trailing entries.

    name: for messages.
    dim: the expert axis, counted from the front (0, 1, ...), so that it names the same axis in an optimizer state.
    rows_per_expert: 1 for a stacked tensor (E, ...); r where the r rows of each expert share one axis (E * r, ...).
    num_trailing: entries after those of the last expert that belong to no routed expert (zero experts); always kept.

    Raises SecateurError when dim or num_trailing is negative or rows_per_expert is below 1.
    """

    name: str
    dim: int
    rows_per_expert: int = 1
    num_trailing: int = 0

    def __post_init__(self) -> None:
        for field, least in (("dim", 0), ("rows_per_expert", 1), ("num_trailing", 0)):
            value = getattr(self, field)
            if value < least:
                raise SecateurError(f"{self.name}: {field} is {value}, expected at least {least}")

    def axis_size(self, num_experts: int) -> int:
        """Entries along `dim` for this many experts: num_experts * rows_per_expert + num_trailing."""
        return num_experts * self.rows_per_expert + self.num_trailing


def row_index(
    order: Sequence[int], num_experts: int, tensor: ExpertTensor, device: torch.device | str | None = None
) -> Tensor:
    """Entries of the expert axis to take, int64 (N * r + t,), for order[new] = old.

    Raises SecateurError when order is empty, repeats an expert or names one outside 0..num_experts-1.
    """
    import torch  # here: headers are checked against an axis without it

    if len(order) == 0:
        raise SecateurError(f"{tensor.name}: the order is empty, expected at least one expert to stay")
    for expert in order:
        if not isinstance(expert, int) or not 0 <= expert < num_experts:
            raise SecateurError(f"{tensor.name}: the order names expert {expert!r}, expected 0..{num_experts - 1}")
    if len(set(order)) != len(order):
        repeated = sorted({expert for expert in order if order.count(expert) > 1})
        raise SecateurError(f"{tensor.name}: the order names experts {repeated} more than once, expected once")
    first = torch.tensor(order, dtype=torch.int64, device=device) * tensor.rows_per_expert
    rows = (first[:, None] + torch.arange(tensor.rows_per_expert, device=device)).flatten()
    trailing = torch.arange(tensor.num_trailing, device=device) + num_experts * tensor.rows_per_expert
    return torch.cat((rows, trailing))


def check_axis(shape: Sequence[int], spec: ExpertTensor, num_experts: int) -> None:
    """Raise SecateurError unless a tensor of this shape can hold num_experts experts as `spec` says."""
    expected = spec.axis_size(num_experts)
    if spec.dim >= len(shape):
        raise SecateurError(f"{spec.name}: shape {tuple(shape)} has no axis {spec.dim}, expected one of {expected}")
    if shape[spec.dim] != expected:
        raise SecateurError(
            f"{spec.name}: axis {spec.dim} of shape {tuple(shape)} has {shape[spec.dim]} entries, expected {expected}"
            f" ({num_experts} experts x {spec.rows_per_expert} rows + {spec.num_trailing} trailing)"
        )


def gather(tensor: Tensor, spec: ExpertTensor, order: Sequence[int], num_experts: int) -> Tensor:
    """The experts of `tensor` in the given order (order[new] = old), trailing rows kept.

    tensor: axis spec.dim has num_experts * r + t entries; any dtype, any device.
    Returns a contiguous tensor with storage of its own, same dtype and device, outside autograd, in which that axis
    has len(order) * r + t entries.
    Raises SecateurError when the axis has another size or the order does not fit (see row_index).
    """
    check_axis(tensor.shape, spec, num_experts)
    return tensor.detach().index_select(spec.dim, row_index(order, num_experts, spec, tensor.device))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, told without loading torch.distributed."""
    return hasattr(tensor, "device_mesh")
