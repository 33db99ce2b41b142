"""What a model is called with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Sequences of tokens that go through a model together.

    Args:
        input_ids: (B, S) int64.
        attention_mask: (B, S) int64, 0 where a token is padding; None where nothing is.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    def to(self, device: str) -> Batch:
        """The same on another device."""
        mask = self.attention_mask
        return Batch(input_ids=self.input_ids.to(device), attention_mask=None if mask is None else mask.to(device))
