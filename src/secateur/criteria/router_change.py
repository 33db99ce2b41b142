"""Scores that need two routers and no data: how fine-tuning changed each expert's row (arXiv 2405.16646).

Shapes: E experts of a layer, D model width. Scores are (E,) float64, higher = keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterChange:
    """What fine-tuning did to the router of one layer; all (E,) float64.

    Args:
        norm_before: L2 norm of each expert's row in the pre-trained model. norm_after: in the fine-tuned one.
        norm_of_difference: L2 norm of the difference of the two rows.
    """

    norm_before: Tensor
    norm_after: Tensor
    norm_of_difference: Tensor

    @classmethod
    def of_rows(cls, name: str, before: Tensor, after: Tensor) -> RouterChange:
        """Of the rows of a router, (E, D) in the pre-trained and in the fine-tuned model; computed in float64.

        Raises:
            SecateurError: other shapes, not floating point, or an entry that is not finite.
        """
        if before.shape != after.shape or before.ndim != 2:
            raise SecateurError(
                f"{name}: {tuple(before.shape)} in the pre-trained model and {tuple(after.shape)} in the fine-tuned "
                "one, expected the same (experts, width)"
            )
        for which, rows in (("pre-trained", before), ("fine-tuned", after)):
            if not rows.is_floating_point():
                raise SecateurError(f"{name} of the {which} model has type {rows.dtype}, expected floating point")
            if not rows.isfinite().all():
                raise SecateurError(f"{name} of the {which} model has entries that are not finite")
        old, new = before.detach().double(), after.detach().double()
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (old, new, new - old)]
        return cls(norm_before=norms[0], norm_after=norms[1], norm_of_difference=norms[2])

    @property
    def num_experts(self) -> int:
        return self.norm_before.numel()


def router_norm_change(change: RouterChange) -> Tensor:
    """|w_after| - |w_before|, signed: the expert whose row shrank most goes first (arXiv 2405.16646)."""
    return change.norm_after - change.norm_before


def router_norm_absolute_change(change: RouterChange) -> Tensor:
    """The size of that change, whichever way: an option to compare with; it keeps rows that shrank."""
    return (change.norm_after - change.norm_before).abs()


def router_difference_norm(change: RouterChange) -> Tensor:
    """|w_after - w_before|: an option to compare with; it also sees rows that only turned."""
    return change.norm_of_difference
