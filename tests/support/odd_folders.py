"""Model folders whose names or numbers are out of the common: text models inside others, MTP layers, llama4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Llama4ForConditionalGeneration, PreTrainedModel
from transformers import Qwen3_5MoeForConditionalGeneration as Nested

from support.model_folders import config_of
from support.tiny_models import NUM_EXPERTS, TOP_K, VOCABULARY, tiny_config, tiny_model


def deepseek(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a tiny deepseek_v3, whose layers 1 and 2 have experts."""
    return config_of("deepseek_v3", **changes), on_disk("deepseek_v3")


def on_disk(name: str) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    model = tiny_model(name)
    return revert_weight_conversion(model, dict(model.state_dict()))


def llama4(nested: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "interleave_moe_layer_step": 2,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if not nested:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **text))
    else:
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                  "vision_output_dim": 16, "image_size": 28, "patch_size": 14, "projector_input_dim": 16,
                  "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5}  # fmt: skip
        model = Llama4ForConditionalGeneration(
            AutoConfig.for_model("llama4", text_config=text, vision_config=vision, pad_token_id=0)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # transformers leaves these experts as they were in memory
    return model


def qwen3_5(folder: Path) -> Path:
    torch.manual_seed(0)
    text = tiny_config("qwen3_5_moe_text").to_dict()
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision)
    Nested(config).save_pretrained(folder, max_shard_size="60KB")
    return folder


def with_mtp(prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model with one layer more, for a further token: a copy of its last."""
    config, tensors = deepseek(num_nextn_predict_layers=1)
    extra = {name.replace("model.layers.2.", prefix): value.clone() for name, value in tensors.items() if ".2." in name}
    extra = {name: value for name, value in extra.items() if name not in tensors}
    return config, tensors | extra | {f"{prefix}eh_proj.weight": torch.rand(4, 4)}
