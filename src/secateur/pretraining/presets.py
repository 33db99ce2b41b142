"""Small models to try things on, one a kind of attention. Data only: fields of the family's own config class.

All are deep and wide enough that loads become skewed, and small enough for a laptop (about 3 million parameters with a
vocabulary of 4,096, four fifths of them in experts). Any field can be changed with `--set field=value`.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}

# name -> (model type, what its attention is, config fields)
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        "grouped-query",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_experts": 16,
            "moe_intermediate_size": 96,
            "intermediate_size": 192,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "olmoe",
        "full multi-head",
        {"num_key_value_heads": 4, "num_experts": 16, "intermediate_size": 96, "norm_topk_prob": True},
    ),
    "mixtral": (
        "mixtral",
        "grouped-query, sliding window of 128",
        {"num_key_value_heads": 2, "num_local_experts": 16, "intermediate_size": 96, "sliding_window": 128},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "latent (MLA), first layer dense, shared expert",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "moe_intermediate_size": 96,
            "intermediate_size": 192,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "grouped-query with sinks, sliding window and full in turn",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_local_experts": 16,
            "intermediate_size": 96,
            "sliding_window": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        "hybrid: three linear (gated delta rule) to one full",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 24,
            "linear_value_head_dim": 24,
            "num_experts": 16,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 96,
            "intermediate_size": 192,
            "norm_topk_prob": True,
        },
    ),
}
