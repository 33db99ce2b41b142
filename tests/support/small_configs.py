"""A small config of any model type of transformers, made from its defaults: what is large is made small."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 128
EXPERTS = 8

# By the end of a key's name; where several fit, the first one.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "n_layers": 4,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 2,
    "shared_experts_intermediate_size": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "kv_n_heads": 2,
    "head_dim": 8,
    "hidden_size": 32,
    "d_model": 32,
    "ffn_hidden_size": 32,
    "shared_intermediate_size": 32,
    "router_hidden_size": 16,
    "moe_latent_size": None,
    "intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "index_block_size": 4,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "sliding_window": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 8,
    "use_mamba_kernels": False,
    "first_k_dense_replace": 1,
    "depth": 2,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a model type needs beside that, or instead.
_DOTS3 = {
    "head_dim": 16,
    "index_head_dim": 16,
    **{f"swa_{key}": 8 for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    **{f"swa_{key}": 16 for key in ("head_dim", "q_lora_rank", "kv_lora_rank")},
    **{f"swa_{key}": 4 for key in ("num_attention_heads", "num_key_value_heads")},
}
_OMNI_PARTS = {
    "vision_config": {
        "num_heads": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "out_hidden_size": 32
    },
    "audio_config": {
        "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "output_dim": 32, "downsample_hidden_size": 8,
        "num_mel_bins": 16,
    },
}  # fmt: skip
_OMNI_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
CHANGES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": _DOTS3,
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 120,
        "audio_start_token_id": 121,
        **_OMNI_PARTS,
        "text_config": _OMNI_ROPE,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config; `changes` are further fields, those of parts as dictionaries."""
    fields = _shrunk(AutoConfig.for_model(model_type).to_dict())
    return AutoConfig.for_model(model_type, **_merged(_merged(fields, CHANGES.get(model_type, {})), changes))


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = _shrunk(value)
        elif key in SMALL and value is not None:
            made[key] = SMALL[key]
    if "model_type" in fields:
        made["model_type"] = fields["model_type"]
    return made


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(fields)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key) or {}, value) if isinstance(value, dict) else value
    merged.pop("model_type", None)
    return merged
