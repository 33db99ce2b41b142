"""What are the tensors of a dense model called, and which block is it to a BAM? Data; a new architecture is a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]  # config.json as transformers reads it, with all defaults
FFN_ROLES = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Block:
    """An architecture.

    layers: where its layers are. names: {role in a layer: module}; q, k, v, o, gate, up, down, the norms `norm` and
    `second_norm` before attention and FFN, and `q_norm`, `k_norm`. fused: the module that holds q, k and v, head by
    head, where they are one. outside: {module of a BAM: module}.
    config: fields of `BamConfig` that say what the block computes. zero: keys of the config that must be false, null or
    absent, as a BAM computes as if they were.
    """

    config: Callable[[Config], dict[str, Any]]
    layers: str = "model.layers"
    names: Mapping[str, str]
    fused: str | None = None
    outside: Mapping[str, str] = field(
        default_factory=lambda: {
            "model.embed_tokens": "model.embed_tokens",
            "model.norm": "model.norm",
            "lm_head": "lm_head",
        }
    )
    zero: tuple[str, ...] = ()

    @property
    def ffn(self) -> dict[str, str]:
        """{role: module} of the FFN."""
        return {role: name for role, name in self.names.items() if role in FFN_ROLES}


_NAMES = {
    "norm": "input_layernorm",
    "second_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"mlp.{role}_proj" for role in FFN_ROLES},
}
_NEOX = {
    "norm": "input_layernorm",
    "second_norm": "post_attention_layernorm",
    "o": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def _rms(config: Config, **more: Any) -> dict[str, Any]:
    return {"block": "sequential", "norm_type": "rms", "norm_eps": config["rms_norm_eps"], **more}


def _llama(config: Config) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    return _rms(config, attention_bias=bias, attention_output_bias=bias, mlp_bias=bool(config["mlp_bias"]))


def _qwen3(config: Config) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    return _rms(config, attention_bias=bias, attention_output_bias=bias, qk_norm=True)


def _stablelm(config: Config) -> dict[str, Any]:
    return {
        "block": "parallel" if config["use_parallel_residual"] else "sequential",
        "norm_type": "layer",
        "norm_bias": True,
        "norm_eps": config["layer_norm_eps"],
        "attention_bias": bool(config["use_qkv_bias"]),
    }


def _cohere(config: Config) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    return {
        "block": "parallel",
        "norm_type": "layer",
        "norm_eps": config["layer_norm_eps"],
        "attention_bias": bias,
        "attention_output_bias": bias,
        "rope_interleaved": True,
        "logit_scale": config["logit_scale"],
    }


def _neox(config: Config) -> dict[str, Any]:
    bias = bool(config["attention_bias"])
    return {
        "block": "parallel_two_norms" if config["use_parallel_residual"] else "sequential",
        "norm_type": "layer",
        "norm_bias": True,
        "norm_eps": config["layer_norm_eps"],
        "mlp_gated": False,
        "num_key_value_heads": config["num_attention_heads"],
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": True,
    }


BLOCKS: Mapping[str, Block] = MappingProxyType(
    {
        "llama": Block(names=_NAMES, config=_llama),
        "mistral": Block(names=_NAMES, config=lambda config: _rms(config, sliding_window=config["sliding_window"])),
        "qwen2": Block(
            names=_NAMES, config=lambda config: _rms(config, attention_bias=True), zero=("use_sliding_window",)
        ),
        "qwen3": Block(names=_NAMES, config=_qwen3, zero=("use_sliding_window",)),
        "stablelm": Block(names=_NAMES, config=_stablelm, zero=("qk_layernorm",)),
        "cohere": Block(names=_NAMES, config=_cohere, zero=("use_qk_norm",)),
        "gpt_neox": Block(
            names=_NEOX,
            config=_neox,
            layers="gpt_neox.layers",
            fused="attention.query_key_value",
            outside={
                "model.embed_tokens": "gpt_neox.embed_in",
                "model.norm": "gpt_neox.final_layer_norm",
                "lm_head": "embed_out",
            },
        ),
    }
)
# fields of `BamConfig` that have the same name and meaning in every config of BLOCKS
SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "rope_parameters",
    "attention_dropout", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
