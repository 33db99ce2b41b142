"""The attention of a BAM layer: N attention experts in one attention call (arXiv 2408.08274 section 3).

    MoA(u)_t = sum_j g_tj * MHA_j(u)_t

All N * H query heads run at once, the heads of expert j are multiplied by g_tj, and one product with the stacked output
projections adds the experts up. With shared keys and values every expert's queries meet the same ones, and there is one
key/value cache.

Legend: B batch, L tokens of a row, D model width, N attention experts, M sets of keys and values (N, or 1 where they
are shared), H and Hkv heads of one expert, G = H / Hkv, d head width, r rotated part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from secateur.models.bam.configuration import BamConfig
from secateur.models.bam.norms import BamRMSNorm
from secateur.models.bam.routing import BamAttentionRouter


class BamRotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin (B, L, r) of positions, for all kinds of RoPE that transformers has."""

    @staticmethod
    def compute_default_rope_parameters(config: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """(inverse frequencies (r / 2,), 1.0): RoPE as it was published, on the first r numbers of a head."""
        rotated = int(config.attention_sizes.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        powers = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
        return 1.0 / config.rope_parameters["rope_theta"] ** powers, 1.0


class BamAttention(nn.Module):
    """The attention experts of a layer and, if there are several, their router."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        experts, kv_sets, heads, kv_heads, head = config.attention_sizes
        self.config, self.layer_idx = config, layer_idx
        self.num_attention_experts, self.head_dim = experts, head
        self.kv_heads = kv_heads * kv_sets  # of all experts
        # how many query heads meet one key head: what attention functions read
        self.num_key_value_groups = experts * heads // self.kv_heads
        self.scaling = head**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, heads = config.hidden_size, experts * heads
        self.q_proj = nn.Linear(width, heads * head, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, self.kv_heads * head, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, self.kv_heads * head, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head, width, bias=False)
        self.o_bias = nn.Parameter(torch.empty(experts, width)) if config.attention_output_bias else None
        self.q_norm = BamRMSNorm(head, config.norm_eps, experts) if config.qk_norm else None
        self.k_norm = BamRMSNorm(head, config.norm_eps, kv_sets) if config.qk_norm else None
        self.router = BamAttentionRouter(config) if experts > 1 else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(mixed outputs (B, L, D), attention weights (B, N * H, L, tokens seen) or None) of (B, L, D).

        Heads of the weights are in the order of the experts.
        """
        rows, length, _ = hidden_states.shape
        number, head = self.num_attention_experts, self.head_dim
        query = self._heads(self.q_proj(hidden_states), self.q_norm)
        key = self._heads(self.k_proj(hidden_states), self.k_norm)
        value = self.v_proj(hidden_states).view(rows, length, -1, head).transpose(1, 2)
        query, key = self._rotated(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            self._by_key_head(query),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        heads = self._by_expert(mixed.view(rows, length, -1, head), dim=2).reshape(rows, length, number, -1)
        weights = None if weights is None else self._by_expert(weights, dim=1)
        if self.router is None:
            gates = heads.new_ones(rows, length, 1)
        else:
            gates = self.router(hidden_states)[1].view(rows, length, number).to(heads.dtype)
            heads = heads * gates[..., None]
        outputs: Tensor = self.o_proj(heads.flatten(2))
        return outputs if self.o_bias is None else outputs + gates @ self.o_bias, weights

    def _heads(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, heads, L, d) of (B, L, heads * d), each head normed by the weight of its expert."""
        rows, length, _ = projected.shape
        if norm is not None:
            weight: Any = norm.weight
            projected = norm(projected.view(rows, length, len(weight), -1, self.head_dim))
        return projected.reshape(rows, length, -1, self.head_dim).transpose(1, 2)

    def _rotated(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Both with RoPE on the first r numbers of each head.

        Neighbours become halves where pairs of neighbours are rotated: the same permutation of queries and keys changes
        no score, and the halves are what `apply_rotary_pos_emb` rotates.
        """
        rotated = cos.shape[-1]
        parts = [torch.split(one, [rotated, self.head_dim - rotated], dim=-1) for one in (query, key)]
        turned = [one for one, _ in parts]
        if self.config.rope_interleaved:
            turned = [_split(one, -1, -1, 2).transpose(-1, -2).flatten(-2) for one in turned]
        turned = list(apply_rotary_pos_emb(*turned, cos, sin))
        query, key = (torch.cat((one, rest), dim=-1) for one, (_, rest) in zip(turned, parts, strict=True))
        return query, key

    # Attention functions give query head h the key head h // num_key_value_groups. Where all experts share the keys,
    # the heads of the experts (expert, key head, G) are therefore called in the order (key head, expert, G).

    @property
    def _shares(self) -> bool:
        return self.num_attention_experts > 1 and not self.config.kv_experts and self.kv_heads > 1

    def _by_key_head(self, query: Tensor) -> Tensor:
        """(B, N * H, L, d) in the order in which they are called."""
        if not self._shares:
            return query
        return _split(query, 1, self.num_attention_experts, self.kv_heads, -1).transpose(1, 2).flatten(1, 3)

    def _by_expert(self, called: Tensor, dim: int) -> Tensor:
        """What was called, with its heads on axis `dim` back in the order of the experts."""
        if not self._shares:
            return called
        split = _split(called, dim, self.kv_heads, self.num_attention_experts, -1)
        return split.transpose(dim, dim + 1).flatten(dim, dim + 2)


def _split(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """With axis `dim` as several axes of these sizes."""
    split: Tensor = tensor.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split
