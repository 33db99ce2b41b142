"""Ridge regression from hidden states to targets, from sums that can be merged and grown (2603.29765, as we read it).

Shapes: D hidden size, U targets, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_LAMBDA = 1e-3  # of the mean of the diagonal of sum h h^T


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeSums:
    """hh: (D, D) sum of h h^T. yh: (U, D) sum of y h^T. counts: (U,) sum of y. All float64."""

    hh: Tensor
    yh: Tensor
    counts: Tensor

    @classmethod
    def zero(cls, units: int, hidden: int) -> RidgeSums:
        return cls(
            hh=torch.zeros(hidden, hidden, dtype=torch.float64),
            yh=torch.zeros(units, hidden, dtype=torch.float64),
            counts=torch.zeros(units, dtype=torch.float64),
        )

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> RidgeSums:
        """inputs: (T, D). targets: (T, U)."""
        h, y = inputs.double(), targets.double()
        return cls(hh=h.T @ h, yh=y.T @ h, counts=y.sum(0))

    def __add__(self, other: RidgeSums) -> RidgeSums:
        return RidgeSums(hh=self.hh + other.hh, yh=self.yh + other.yh, counts=self.counts + other.counts)

    def with_unit(self, inputs: Tensor) -> RidgeSums:
        """The sums with one more target, which is 1 on `inputs` (T, D) and 0 on all that was seen before."""
        new = RidgeSums.of(inputs, torch.ones(len(inputs), 1))
        return RidgeSums(
            hh=self.hh + new.hh, yh=torch.cat([self.yh, new.yh]), counts=torch.cat([self.counts, new.counts])
        )

    def solve(self, relative_lambda: float = RELATIVE_LAMBDA) -> Tensor:
        """(U, D) R = yh (hh + lambda I)^-1; lambda is relative to the mean of the diagonal of hh."""
        mean = float(self.hh.diagonal().mean())
        damped = self.hh + torch.eye(len(self.hh), dtype=torch.float64) * (relative_lambda * mean or 1.0)
        solved: Tensor = torch.linalg.solve(damped, self.yh.T).T
        return solved
