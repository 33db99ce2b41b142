"""The norms of BAM: over the model width, and over each head with one weight an attention expert.

Legend: B batch, L tokens of a row, D model width, G attention experts (or sets of keys and values), H heads, d head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models.bam.configuration import BamConfig


class BamRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 at least, the weight applied in the type of x as Llama does it.

    Args:
        groups: weights; 0 for one vector of all, else (groups, width) for inputs (..., groups, H, width).
    """

    def __init__(self, width: int, eps: float, groups: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, width) if groups else torch.ones(width))
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        weight = self.weight[:, None] if self.weight.ndim == 2 else self.weight
        scaled: Tensor = weight * normed.to(inputs.dtype)
        return scaled


def norm_of(config: BamConfig) -> nn.Module:
    """A norm over the model width of the config's kind."""
    if config.norm_type == "rms":
        return BamRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
