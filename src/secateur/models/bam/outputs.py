"""What the models of BAM give back.

Legend: B batch, L tokens of a row, N attention experts, E FFN experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class BamModelOutput(MoeModelOutputWithPast):
    """router_logits, attention_router_logits: where asked for, (B * L, E) and (B * L, N) of every layer."""

    attention_router_logits: tuple[Tensor, ...] | None = None


@dataclass
class BamCausalLMOutput(MoeCausalLMOutputWithPast):
    """aux_loss: alpha * load_balance_loss + beta * router_z_loss, which are sums over layers; with labels only.

    In training the loss includes it; where a step has several batches, by this batch's share of the targets.
    """

    load_balance_loss: Tensor | None = None
    router_z_loss: Tensor | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None
