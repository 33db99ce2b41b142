"""The two routers of a BAM layer: who attends for a token, and whose FFN it goes to.

Legend: B batch, L tokens of a row, T = B * L tokens, D model width, N attention experts, E FFN experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models.bam.configuration import BamConfig


class _Router(nn.Module):
    """One row an expert, no bias. Its probabilities are in float32 at least: narrower ones tie."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def probabilities(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (T, rows), their softmax) of hidden states (..., D)."""
        logits = nn.functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        return logits, logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


class BamRouter(_Router):
    """The FFN router: the K largest of the softmax over all experts, with these weights as they are."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config.num_experts, config.hidden_size)
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.renormalise_top1

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (T, E), weights (T, K), experts (T, K)), largest weight first."""
        logits, probabilities = self.probabilities(hidden_states)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:  # p / p is 1 whatever p is: without gradient it is so to the bit
            weights = torch.ones_like(weights) if self.top_k == 1 else weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts


class BamAttentionRouter(_Router):
    """The attention router: the softmax over all attention experts, all but the `top_k` largest set to 0 if asked."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config.attention_sizes.experts, config.hidden_size)
        self.top_k = config.attention_top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (T, N), weights (T, N))."""
        logits, weights = self.probabilities(hidden_states)
        if self.top_k is not None:
            best = weights.topk(self.top_k, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
        return logits, weights
