"""Tiny BAM models, one of each kind; dense parents of the shapes that BAM takes; and attention experts in a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from secateur.models.bam import BamConfig, BamForCausalLM
from secateur.models.bam.attention import BamAttention

VOCABULARY = 48
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "own keys": {"num_experts": 3},
    "shared keys": {
        "num_experts": 3,
        "kv_experts": False,
        "block": "sequential",
        "norm_type": "rms",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "head_dim": 6,
        "tie_word_embeddings": True,
    },
    "sparse": {
        "num_experts": 4,
        "num_attention_experts": 3,
        "num_experts_per_tok": 2,
        "attention_top_k": 2,
        "block": "parallel_two_norms",
        "norm_bias": True,
        "mlp_gated": False,
        "rope_interleaved": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "sliding_window": 5,
        "logit_scale": 0.5,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny_bam(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> BamForCausalLM:
    """A model of a row with random weights, norms and biases too, large enough for tokens to differ; in evaluation."""
    fields = COMMON | {"initializer_range": 0.4, "router_init_std": 0.6} | KINDS[kind] | changes
    torch.manual_seed(seed)
    model = BamForCausalLM(BamConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if dtype == torch.float64:  # torch's grouped product takes no float64
        model.set_experts_implementation("eager")  # type: ignore[no-untyped-call]
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random_hidden(*shape: int, seed: int = 0) -> Tensor:
    """Float64, (*shape, D)."""
    width = COMMON["hidden_size"]
    return torch.randn(*shape, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(model: BamForCausalLM, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for hidden states (B, L, D)."""
    found: tuple[Tensor, Tensor] = model.model.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
    return found


def attend_one(attention: BamAttention, expert: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H * d), one attention expert alone, causal, without its output projection: the formulas of the paper."""
    config = attention.config
    heads, kv_heads, head = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    assert kv_heads is not None
    kv = expert if config.kv_experts else 0

    def project(name: str, number: int, own: int) -> Tensor:
        linear = attention.get_submodule(name)
        rows = slice(own * number * head, (own + 1) * number * head)
        weight, bias = linear.get_parameter("weight")[rows], linear.bias
        flat = hidden @ weight.T + (0 if not isinstance(bias, Tensor) else bias[rows])
        return flat.unflatten(-1, (number, head)).transpose(1, 2)

    def normed(value: Tensor, norm: Any, own: int) -> Tensor:
        if norm is None:
            return value
        return value * (value.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight[own]

    query = normed(project("q_proj", heads, expert), attention.q_norm, expert)
    key = normed(project("k_proj", kv_heads, kv), attention.k_norm, kv)
    value = project("v_proj", kv_heads, kv)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key, value = (one.repeat_interleave(heads // kv_heads, dim=1) for one in (key, value))
    scores = query @ key.transpose(-1, -2) / head**0.5
    length = hidden.shape[1]
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def output_of(attention: BamAttention, expert: int) -> tuple[Tensor, Tensor | float]:
    """(Wo (D, H * d), bias) of one attention expert."""
    width = attention.config.num_attention_heads * attention.head_dim
    bias = 0.0 if attention.o_bias is None else attention.o_bias[expert]
    return attention.o_proj.weight[:, expert * width : (expert + 1) * width], bias


# Dense parents: model type -> fields of its config, and what BamConfig says of its block.


@dataclass(frozen=True, kw_only=True)
class Parent:
    model_type: str
    fields: Mapping[str, Any]
    block: Mapping[str, Any]
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state  # to the names of Llama


def _of_neox(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "gpt_neox.embed_in": "model.embed_tokens",
        "gpt_neox.final_layer_norm": "model.norm",
        "embed_out": "lm_head",
        "gpt_neox.layers": "model.layers",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    found = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "query_key_value" in name:  # (heads, q k v, d)
            parts = tensor.unflatten(0, (COMMON["num_attention_heads"], 3, -1)).transpose(0, 1).flatten(1, 2)
            for part, value in zip("qkv", parts, strict=True):
                found[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = value
        else:
            found[name] = tensor
    return found


_HALF_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_RMS = {"block": "sequential", "norm_type": "rms", "norm_eps": 1e-6}
PARENTS = {
    "llama": Parent(
        model_type="llama",
        fields={"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA_3},
        block=_RMS
        | {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA_3},
    ),
    "mistral": Parent(model_type="mistral", fields={"sliding_window": 5}, block=_RMS | {"sliding_window": 5}),
    "qwen2": Parent(model_type="qwen2", fields={}, block=_RMS | {"attention_bias": True}),
    "qwen3": Parent(
        model_type="qwen3",
        fields={"head_dim": 6, "tie_word_embeddings": True},
        block=_RMS | {"qk_norm": True, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "stablelm": Parent(
        model_type="stablelm",
        fields={"use_parallel_residual": True, "use_qkv_bias": True, "rope_parameters": _HALF_ROTATED},
        block={"norm_bias": True, "attention_bias": True, "rope_parameters": _HALF_ROTATED},
    ),
    "cohere": Parent(
        model_type="cohere",
        fields={"logit_scale": 0.25, "tie_word_embeddings": True},
        block={
            "rope_interleaved": True,
            "logit_scale": 0.25,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "gpt_neox": Parent(
        model_type="gpt_neox",
        fields={"hidden_act": "gelu", "use_parallel_residual": True, "rope_parameters": _HALF_ROTATED},
        block={
            "block": "parallel_two_norms",
            "norm_bias": True,
            "mlp_gated": False,
            "hidden_act": "gelu",
            "num_key_value_heads": 4,
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "rope_parameters": _HALF_ROTATED,
        },
        rename=_of_neox,
    ),
}


def dense_parent(name: str, seed: int) -> PreTrainedModel:
    """With random weights, norms and biases too, in evaluation mode."""
    torch.manual_seed(seed)
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(
        PARENTS[name].model_type, **COMMON | special | {"initializer_range": 0.4} | PARENTS[name].fields
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _of_block(name: str) -> dict[str, Any]:
    return COMMON | dict(PARENTS[name].block)


def mixed(name: str, parents: Sequence[PreTrainedModel], **changes: Any) -> BamForCausalLM:
    """The BAM of dense parents of one type: experts copied, norms and embeddings averaged, routers random."""
    torch.manual_seed(0)
    model = BamForCausalLM(BamConfig(**_of_block(name) | {"num_experts": len(parents)} | changes)).eval()
    states = [PARENTS[name].rename(dict(parent.state_dict())) for parent in parents]
    first = "gate_up_proj" if model.config.mlp_gated else "up_proj"
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("router.weight", "gate.weight")):
                continue
            is_bias = key.endswith("bias")
            if "mlp.experts" in key:
                layer, last = key.split("mlp.experts.")[0], "bias" if is_bias else "weight"
                down = "down_proj" in key
                parts = ["down_proj"] if down else ["gate_proj", "up_proj"] if first == "gate_up_proj" else ["up_proj"]
                own = [torch.cat([state[f"{layer}mlp.{part}.{last}"] for part in parts]) for state in states]
                parameter.copy_(torch.stack(own))
            elif "self_attn" in key:
                own = [state[key.replace("o_bias", "o_proj.bias")] for state in states]
                is_stacked = "o_bias" in key or "_norm" in key
                join = torch.stack if is_stacked else functools.partial(torch.cat, dim=1 if "o_proj" in key else 0)
                parameter.copy_(
                    join(own) if parameter.numel() > own[0].numel() or len(own) == 1 else sum(own) / len(own)
                )
            else:
                parameter.copy_(sum(state[key] for state in states) / len(states))
    return model
