"""Tiny models of the families Secateur prunes. A new family is one row of FAMILIES and runs through every test on it.

A row holds what to build and what must be found in it, written down from the published layout of the family and not
computed: where its experts are is what the tests check.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.families import MoEModel
from secateur.plan import LayerPlan, Plan

VOCABULARY = 64
NUM_EXPERTS = 8
TOP_K = 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# Expert tensors inside the `experts` module of most families -> their expert axis.
STACKED = {"experts.gate_up_proj": 0, "experts.down_proj": 0}
WITH_BIASES = STACKED | {"experts.gate_up_proj_bias": 0, "experts.down_proj_bias": 0}
NO_GATE = {"experts.up_proj": 0, "experts.down_proj": 0}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 2, "mamba_expand": 2}


def _moe(key: str, width_key: str, width: int = 24, top_k_key: str = "num_experts_per_tok") -> dict[str, Any]:
    return {key: NUM_EXPERTS, width_key: width, top_k_key: TOP_K}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One tiny model and its expert layout.

    fields: of the family's config class, beside COMMON. block: module path of the MoE block, N is the layer. tensors:
    name inside the block -> expert axis. rows: rows an expert takes on that axis, where that is not 1. layers: the MoE
    layers. count_key: the config key of the expert count. attributes: where else the count is held, "" is the root of
    the model, N the layer. has_loss: output_router_logits adds a balance loss to the loss.
    """

    model_type: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, int]
    count_key: str
    router: str = "mlp.gate"
    rows: Mapping[str, int] = field(default_factory=dict)
    block: str = "model.layers.N.mlp"
    layers: tuple[int, ...] = (0, 1, 2)
    num_groups: int = 1
    min_experts: int = TOP_K
    has_loss: bool = False


FAMILIES: dict[str, Family] = {}
