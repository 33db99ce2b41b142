"""A block of BAM: attention experts and FFN experts in the order of the parents' block.

Legend: B batch, L tokens of a row, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from secateur.models.bam.attention import BamAttention
from secateur.models.bam.configuration import BamConfig
from secateur.models.bam.experts import BamMoE
from secateur.models.bam.norms import norm_of


class BamDecoderLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A block of the parents' shape (see `BamConfig.block`)."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.block = config.block
        self.input_layernorm = norm_of(config)
        self.self_attn = BamAttention(config, layer_idx)
        self.post_attention_layernorm = None if config.block == "parallel" else norm_of(config)
        self.mlp = BamMoE(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D) of (B, L, D)."""
        inputs = self.input_layernorm(hidden_states)
        outputs: Tensor = hidden_states + self.self_attn(inputs, **kwargs)[0]
        if self.post_attention_layernorm is not None:
            read = hidden_states if self.block == "parallel_two_norms" else outputs
            inputs = self.post_attention_layernorm(read)
        mixed: Tensor = self.mlp(inputs)
        return outputs + mixed
