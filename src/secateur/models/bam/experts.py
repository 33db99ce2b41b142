"""The FFN experts of a BAM layer, in the form that all MoE models of transformers have.

Legend: T tokens, D model width, F inner width of an expert, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from secateur.models.bam.configuration import BamConfig
from secateur.models.bam.routing import BamRouter


@use_experts_implementation
class _StackedExperts(nn.Module):
    """E FFNs, stacked on axis 0: `down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`."""

    _apply_gate: Any  # put here by transformers

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        inner, outer = config.intermediate_size, config.hidden_size
        first = "gate_up_proj" if config.mlp_gated else "up_proj"
        rows = 2 * inner if config.mlp_gated else inner
        setattr(self, first, nn.Parameter(torch.empty(self.num_experts, rows, outer)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, outer, inner))
        if config.mlp_bias:
            setattr(self, f"{first}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, outer))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the experts' outputs (T, D) for inputs (T, D), expert numbers (T, K) and their weights (T, K)."""
        result = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            token, turn = (top_k_index == expert).nonzero().unbind(dim=1)
            inner = nn.functional.linear(hidden_states[token], *self._of("gate_up_proj", "up_proj", expert))
            inner = self._apply_gate(inner) if hasattr(self, "gate_up_proj") else self.act_fn(inner)
            outer = nn.functional.linear(inner, *self._of("down_proj", "down_proj", expert))
            result = result.index_add(0, token, (outer * top_k_weights[token, turn, None]).to(result.dtype))
        return result

    def _of(self, gated: str, plain: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """(weight, bias or None) of one expert."""
        name = gated if hasattr(self, gated) else plain
        bias: Tensor | None = getattr(self, f"{name}_bias", None)
        weight: Tensor = getattr(self, name)
        return weight[expert], None if bias is None else bias[expert]


class BamExperts(_StackedExperts):
    """The experts, with the gate and the biases that the config says; transformers asks the module for both."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.has_gate, self.has_bias = config.mlp_gated, config.mlp_bias


class BamMoE(nn.Module):
    """The FFN of a layer: a router and its experts."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.gate = BamRouter(config)
        self.experts = BamExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) of (B, L, D)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(tokens)
        outputs: Tensor = self.experts(tokens, experts, weights)
        return outputs.view_as(hidden_states)
