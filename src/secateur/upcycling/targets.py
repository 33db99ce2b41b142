"""Which stock Mixture-of-Experts architecture takes the weights of which dense one? Data; a new pair is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from secateur.errors import SecateurError

# Of a dense layer, the same in all families of ROUTES.
FFN = MappingProxyType({"gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight"})
_ATTENTION = frozenset(f"self_attn.{name}_proj.weight" for name in "qkvo")
_NORMS = frozenset({"input_layernorm.weight", "post_attention_layernorm.weight"})
_QKV_BIAS = frozenset(f"self_attn.{name}_proj.bias" for name in "qkv")
_QK_NORM = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
OUTSIDE = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
_QWEN_NAMES = MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


@dataclass(frozen=True, kw_only=True)
class Target:
    """A stock architecture.

    router, expert: names in a layer; `expert` has places for its number and one of `names`. keeps: names in a layer
    that it shares with dense models. count, width: keys of config.json. renormalises: the key that says whether the
    chosen weights are divided by their sum, None where they always are. shared: whether it has a shared expert.
    fixed: further keys. leaves: keys of the dense config.json that mean nothing here.
    """

    model_type: str
    architecture: str
    router: str
    expert: str
    names: Mapping[str, str]
    keeps: frozenset[str]
    count: str
    width: str
    renormalises: str | None
    shared: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


_QWEN: dict[str, Any] = {
    "router": "mlp.gate.weight",
    "expert": "mlp.experts.{}.{}.weight",
    "names": _QWEN_NAMES,
    "count": "num_experts",
    "width": "moe_intermediate_size",
    "renormalises": "norm_topk_prob",
}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.model_type: target
        for target in (
            Target(
                model_type="mixtral",
                architecture="MixtralForCausalLM",
                router="block_sparse_moe.gate.weight",
                expert="block_sparse_moe.experts.{}.{}.weight",
                names=MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"}),
                keeps=_ATTENTION | _NORMS,
                count="num_local_experts",
                width="intermediate_size",
                renormalises=None,
            ),
            Target(
                model_type="qwen2_moe",
                architecture="Qwen2MoeForCausalLM",
                keeps=_ATTENTION | _NORMS | _QKV_BIAS,
                shared=True,
                fixed=_EVERY_LAYER,
                **_QWEN,
            ),
            Target(
                model_type="qwen3_moe",
                architecture="Qwen3MoeForCausalLM",
                keeps=_ATTENTION | _NORMS | _QK_NORM,
                fixed=_EVERY_LAYER,
                **_QWEN,
            ),
        )
    }
)
# not stock: what its tensors are stands in `bam`
BAM = Target(
    model_type="bam",
    architecture="BamForCausalLM",
    router="mlp.gate.weight",
    expert="",
    names={},
    keeps=frozenset(),
    count="num_experts",
    width="intermediate_size",
    renormalises="renormalise_top1",
)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense architecture. targets: the first is taken for whole experts. split: what a divided FFN becomes.

    zero: keys of its config that must be false, null or absent, since the targets compute as if they were; by target.
    extra: keys that a target needs of this family.
    """

    architecture: str
    targets: tuple[str, ...]
    split: str
    zero: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_BIASES = ("attention_bias", "mlp_bias")
_NO_BIAS = {"qwen2_moe": {"qkv_bias": False, "use_sliding_window": False}}
ROUTES: Mapping[str, Dense] = MappingProxyType(
    {
        "llama": Dense(
            architecture="LlamaForCausalLM",
            targets=("mixtral", "qwen2_moe"),
            split="qwen2_moe",
            zero={"mixtral": _BIASES, "qwen2_moe": _BIASES},
            extra=_NO_BIAS,
        ),
        "mistral": Dense(
            architecture="MistralForCausalLM",
            targets=("mixtral", "qwen2_moe"),
            split="qwen2_moe",
            zero={"qwen2_moe": ("sliding_window",)},
            extra=_NO_BIAS,
        ),
        "qwen2": Dense(
            architecture="Qwen2ForCausalLM",
            targets=("qwen2_moe",),
            split="qwen2_moe",
            zero={"qwen2_moe": ("use_sliding_window",)},
            extra={"qwen2_moe": {"qkv_bias": True}},
        ),
        "qwen3": Dense(
            architecture="Qwen3ForCausalLM",
            targets=("qwen3_moe",),
            split="qwen3_moe",
            zero={"qwen3_moe": ("attention_bias", "use_sliding_window")},
        ),
    }
)


def target_for(model_type: str, wanted: str | None, *, split: bool) -> Target:
    """What parents of a type become.

    Args:
        wanted: a model type that the caller asked for; without it the first of the row.

    Raises:
        SecateurError: no stock architecture has the form of these parents, or not the one that is wanted.
    """
    dense = ROUTES.get(model_type)
    if dense is None:
        raise SecateurError(
            f"model type {model_type!r}: no stock Mixture-of-Experts of this form is known; expected one of "
            f"{', '.join(ROUTES)}"
        )
    name = wanted or (dense.split if split else dense.targets[0])
    if name not in dense.targets:
        raise SecateurError(
            f"--target {name}: {model_type} parents do not become that, expected {', '.join(dense.targets)}"
        )
    return TARGETS[name]
