"""Tiny models of the families Secateur prunes. A new family is one row of FAMILIES and runs through every test on it.

A row holds what to build and what must be found in it, written down from the published layout of the family and not
computed: finding it is what is tested.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.families import MoEModel, logits_of
from secateur.plans import LayerPlan, Plan
from support.long_tests import long

VOCABULARY = 64
NUM_EXPERTS = 8
TOP_K = 2
WIDTH = 24  # of an expert

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

# How a row is read: _std(model type, key of the expert count, groups of config fields..., what differs from Family's
# defaults). The groups have names where several rows share them. Of the layout:
#   STACKED, NO_GATE, EXPERT_BIASES: tensors of the experts module. SELECTION_BIAS, _BIASED: a bias of the choice.
#   _NOT_FIRST, _DEEPSEEK_V3: a dense first layer; with a bias. _TWO_GROUPS: a grouped router. _LOSS: a balance loss.
#   _GRANITE: where its MoE block is.
# Of the config:
#   _LOCAL, _ROUTED: keys of the count. WIDE, NARROW: which key is an expert's width. GROUPS, ONE_GROUP: of the router.
#   DEEPSEEK: NARROW, a dense first layer, a shared expert. HEADS, MLA, INDEXER: kinds of attention.
#   HYBRID, GATED_DELTA: layers without attention.
#
# Expert tensors of most families -> their expert axis; then the other layouts of `experts` and of routers.
STACKED = {"experts.gate_up_proj": 0, "experts.down_proj": 0}
NO_GATE = {"experts.up_proj": 0, "experts.down_proj": 0}
EXPERT_BIASES = {"experts.gate_up_proj_bias": 0, "experts.down_proj_bias": 0}
SELECTION_BIAS = {"gate.e_score_correction_bias": 0}

# Config fields that several families share.
WIDE = {"intermediate_size": WIDTH}  # experts as wide as "intermediate_size" says
NARROW = {"moe_intermediate_size": WIDTH, "intermediate_size": 32}  # dense layers have a width of their own
HEADS = {"head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
DEEPSEEK = NARROW | {"first_k_dense_replace": 1, "n_shared_experts": 1}
MLA = HEADS | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
GATED_DELTA = HYBRID | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One tiny model and its expert layout.

    key, top_k_key: dotted config keys of the expert count and of top-k. fields: other fields of the config class,
    beside COMMON. layers: its MoE layers. block, router: module path of the MoE block of layer N, and the router in it.
    tensors: name in the block -> expert axis. rows: rows an expert takes on that axis, where that is not 1.
    trailing: rows after those of the last expert. balance_loss: output_router_logits adds one to the loss.
    """

    model_type: str
    key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    fields: Mapping[str, Any]
    layers: tuple[int, ...] = (0, 1, 2)
    block: str = "model.layers.N.mlp"
    router: str = "gate"
    tensors: Mapping[str, int]
    rows: Mapping[str, int] = field(default_factory=dict)
    trailing: Mapping[str, int] = field(default_factory=dict)
    num_groups: int = 1
    min_experts: int = TOP_K
    balance_loss: bool = False


def _std(model_type: str, key: str = "num_experts", *fields: Mapping[str, Any], **others: Any) -> Family:
    """A row of the commonest layout: `mlp.gate.weight` and stacked experts."""
    merged = {name: value for part in fields for name, value in part.items()}
    return Family(model_type=model_type, key=key, fields=merged, **{"tensors": {"gate.weight": 0} | STACKED, **others})


_BIASED = {"gate.weight": 0} | STACKED | SELECTION_BIAS
_NOT_FIRST: dict[str, Any] = {"layers": (1, 2)}
_DEEPSEEK_V3: dict[str, Any] = _NOT_FIRST | {"tensors": _BIASED}
_TWO_GROUPS: dict[str, Any] = {"num_groups": 2, "min_experts": 4}
_LOCAL, _ROUTED = "num_local_experts", "n_routed_experts"
_GRANITE: dict[str, Any] = {
    "block": "model.layers.N.block_sparse_moe",
    "router": "router",
    "tensors": {"router.weight": 0} | STACKED,
    "balance_loss": True,
}
_LOSS: dict[str, Any] = {"balance_loss": True}

FAMILIES: dict[str, Family] = {
    "mixtral": _std("mixtral", _LOCAL, WIDE, **_LOSS),
    "qwen2_moe": _std(
        "qwen2_moe",
        "num_experts",
        NARROW,
        {"shared_expert_intermediate_size": WIDTH, "mlp_only_layers": [1]},
        layers=(0, 2),
        **_LOSS,
    ),
    "qwen3_moe": _std("qwen3_moe", _LOCAL, NARROW, HEADS, **_LOSS),
    "qwen3_next": _std(
        "qwen3_next", "num_experts", NARROW, HEADS, GATED_DELTA, {"shared_expert_intermediate_size": WIDTH}, **_LOSS
    ),
    "qwen3_5_moe_text": _std(
        "qwen3_5_moe_text",
        "num_experts",
        NARROW,
        HEADS,
        GATED_DELTA,
        {"shared_expert_intermediate_size": WIDTH},
        **_LOSS,
    ),
    "olmoe": _std("olmoe", "num_experts", WIDE, **_LOSS),
    "flex_olmo": _std("flex_olmo", "num_experts", WIDE, **_LOSS),
    "deepseek_v2 greedy": _std("deepseek_v2", _ROUTED, DEEPSEEK, MLA, GROUPS, {"topk_method": "greedy"}, **_NOT_FIRST),
    "deepseek_v2 grouped": _std(
        "deepseek_v2",
        _ROUTED,
        DEEPSEEK,
        MLA,
        GROUPS,
        {"topk_method": "group_limited_greedy"},
        **_NOT_FIRST,
        **_TWO_GROUPS,
    ),
    "deepseek_v3": _std("deepseek_v3", _ROUTED, DEEPSEEK, MLA, ONE_GROUP, **_DEEPSEEK_V3),
    "deepseek_v3 grouped": _std("deepseek_v3", _ROUTED, DEEPSEEK, MLA, GROUPS, **_DEEPSEEK_V3, **_TWO_GROUPS),
    "deepseek_v32": _std("deepseek_v32", _ROUTED, DEEPSEEK, MLA, ONE_GROUP, INDEXER, **_DEEPSEEK_V3),
    "glm4_moe": _std("glm4_moe", _ROUTED, DEEPSEEK, HEADS, ONE_GROUP, **_DEEPSEEK_V3),
    "glm4_moe_lite": _std("glm4_moe_lite", _ROUTED, DEEPSEEK, MLA, GROUPS, **_DEEPSEEK_V3, **_TWO_GROUPS),
    "dots1": _std("dots1", _ROUTED, DEEPSEEK, HEADS, GROUPS, **_DEEPSEEK_V3, **_TWO_GROUPS),
    "gpt_oss": _std(
        "gpt_oss",
        _LOCAL,
        WIDE,
        HEADS,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        router="router",
        tensors={"router.weight": 0, "router.bias": 0} | STACKED | EXPERT_BIASES,
        **_LOSS,
    ),
    "phimoe": _std("phimoe", _LOCAL, WIDE, router="router", tensors={"router.weight": 0} | STACKED, **_LOSS),
    "minimax": _std("minimax", _LOCAL, WIDE, HEADS, {"block_size": 8}, **_LOSS),
    "minimax_m2": _std(
        "minimax_m2",
        _LOCAL,
        WIDE,
        HEADS,
        tensors={"gate.weight": 0, "e_score_correction_bias": 0} | STACKED,
        **_LOSS,
    ),
    "granitemoe": _std("granitemoe", _LOCAL, WIDE, **_GRANITE),
    "granitemoeshared": _std("granitemoeshared", _LOCAL, WIDE, {"shared_intermediate_size": WIDTH}, **_GRANITE),
    "granitemoehybrid": _std(
        "granitemoehybrid",
        _LOCAL,
        WIDE,
        {
            "shared_intermediate_size": WIDTH,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_d_conv": 2,
            "mamba_chunk_size": 8,
        },
        **_GRANITE,
    ),
    "ernie4_5_moe": _std(
        "ernie4_5_moe",
        "moe_num_experts",
        NARROW,
        {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        top_k_key="moe_k",
        layers=(1, 2),
        tensors={"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1} | STACKED,
        **_LOSS,
    ),
    "jamba": _std(
        "jamba",
        "num_experts",
        WIDE,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        layers=(0, 2),
        block="model.layers.N.feed_forward",
        router="router",
        tensors={"router.weight": 0} | STACKED,
        **_LOSS,
    ),
    "nemotron_h": _std(
        "nemotron_h",
        _ROUTED,
        NARROW,
        HEADS,
        GROUPS,
        {
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": WIDTH,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "conv_kernel": 2,
            "chunk_size": 8,
        },
        layers=(1, 3),
        block="model.layers.N.mixer",
        tensors={"gate.weight": 0} | NO_GATE | SELECTION_BIAS,
        **_TWO_GROUPS,
    ),
    "lfm2_moe": _std(
        "lfm2_moe",
        "num_experts",
        NARROW,
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
        layers=(1, 2),
        block="model.layers.N.feed_forward",
        tensors={"gate.weight": 0, "expert_bias": 0} | STACKED,
    ),
    "afmoe": _std(
        "afmoe",
        "num_experts",
        NARROW,
        HEADS,
        {
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        layers=(1, 2),
        router="router",
        tensors={"router.gate.weight": 0, "expert_bias": 0} | STACKED,
    ),
    "hunyuan_v1_moe": _std(
        "hunyuan_v1_moe",
        "num_experts",
        WIDE,
        HEADS,
        top_k_key="moe_topk",
        tensors={"gate.wg.weight": 0} | STACKED,
    ),
    "dbrx": Family(
        model_type="dbrx",
        key="ffn_config.moe_num_experts",
        top_k_key="ffn_config.moe_top_k",
        fields={
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": WIDTH, "hidden_size": 32},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        },
        block="transformer.blocks.N.ffn",
        router="router",
        tensors={"router.layer.weight": 0, "experts.mlp.w1": 0, "experts.mlp.v1": 0, "experts.mlp.w2": 0},
        rows={"experts.mlp.w1": WIDTH, "experts.mlp.v1": WIDTH, "experts.mlp.w2": WIDTH},
        balance_loss=True,
    ),
    "exaone_moe": _std(
        "exaone_moe",
        "num_experts",
        NARROW,
        HEADS,
        ONE_GROUP,
        {"num_shared_experts": 1, "first_k_dense_replace": 1},
        **_DEEPSEEK_V3,
    ),
    "aria_text": _std(
        "aria_text",
        "moe_num_experts",
        WIDE,
        {"moe_num_shared_experts": 1},
        top_k_key="moe_topk",
        router="router",
        tensors={"router.weight": 0} | STACKED,
    ),
    "axk1": _std("axk1", _ROUTED, DEEPSEEK, MLA, GROUPS, **_DEEPSEEK_V3, **_TWO_GROUPS),
    "bailing_hybrid": _std(
        "bailing_hybrid", "num_experts", DEEPSEEK, MLA, HYBRID, GROUPS, **_DEEPSEEK_V3, **_TWO_GROUPS
    ),
    "cohere2_moe": _std("cohere2_moe", "num_experts", WIDE, HEADS),
    "hy_v3": _std(
        "hy_v3",
        "num_experts",
        NARROW,
        HEADS,
        {"first_k_dense_replace": 1, "num_shared_experts": 1},
        layers=(1, 2),
        tensors={"gate.weight": 0, "e_score_correction_bias": 0} | STACKED,
    ),
    "laguna": _std("laguna", "num_experts", NARROW, HEADS, layers=(1, 2), tensors=_BIASED, **_LOSS),
    "mellum": _std("mellum", _LOCAL, NARROW, HEADS, **_LOSS),
    "mimo_v2_flash": _std("mimo_v2_flash", _ROUTED, NARROW, HEADS, ONE_GROUP, **_DEEPSEEK_V3),
    "solar_open": _std("solar_open", _ROUTED, NARROW, HEADS, ONE_GROUP, {"n_shared_experts": 1}, tensors=_BIASED),
    "gemma4_text": _std(
        "gemma4_text",
        "num_experts",
        NARROW,
        HEADS,
        {
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        top_k_key="top_k_experts",
        block="model.layers.N",
        router="router",
        tensors={"router.proj.weight": 0, "router.per_expert_scale": 0} | STACKED,
    ),
    # Ours. Its attention experts have a count of their own, which no plan changes. Its balance loss, which no option
    # asks for and which is of each rank's own tokens, has tests of its own.
    "bam": _std("bam", "num_experts", WIDE, {"num_attention_experts": 2, "output_router_logits": False}),
    # Two rows of the router belong to shared experts, which no plan may move.
    "inkling_text": _std(
        "inkling_text",
        _ROUTED,
        NARROW,
        HEADS,
        {"n_shared_experts": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
        tensors=_BIASED,
        trailing={"gate.weight": 2},
    ),
}


# Rows with the routing and layout of another row. That they are found, pruned live to the bits of the oracle, and read
# from a folder as they are live is always shown; what else is said of every family, where SECATEUR_LONG_TESTS is set.
LIKE_ANOTHER = {
    "qwen3_5_moe_text", "olmoe", "flex_olmo", "deepseek_v2 greedy", "deepseek_v32", "glm4_moe", "glm4_moe_lite",
    "dots1", "granitemoeshared", "granitemoehybrid", "exaone_moe", "aria_text", "axk1", "bailing_hybrid",
    "cohere2_moe", "hy_v3", "bam", "laguna", "mellum", "mimo_v2_flash", "solar_open",
}  # fmt: skip
# One row of each layout, for tests that reach a model by its layout alone: experts of their own on the disk, router
# groups, stacked with biases, a bias on another axis, rows that share an axis, other names on the disk, dense layers
# between, experts without a gate, no block of their own, rows of a router that are no expert's.
ONE_OF_EACH_LAYOUT = {
    "mixtral", "deepseek_v3 grouped", "gpt_oss", "ernie4_5_moe", "dbrx", "granitemoe", "jamba", "nemotron_h",
    "gemma4_text", "inkling_text",
}  # fmt: skip


def families(always: Set[str], quick: Set[str] = frozenset(), rows: Iterable[str] = FAMILIES) -> list[Any]:
    """Values of a parameter: `quick` without a mark, others of `always` slow, and the rest long."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(name, marks=[] if name in quick else slow if name in always else [*slow, long]) for name in rows
    ]


KINDS = FAMILIES.keys() - LIKE_ANOTHER
every_family = pytest.mark.parametrize("name", families(KINDS, KINDS))


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a row; `changes` are further fields."""
    family = FAMILIES[name]
    fields = copy.deepcopy(COMMON | dict(family.fields))
    for dotted, value in ((family.key, NUM_EXPERTS), (family.top_k_key, TOP_K)):
        *parent, key = dotted.split(".")
        (fields[parent[0]] if parent else fields)[key] = value
    return AutoConfig.for_model(family.model_type, **fields | changes)


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a row with random weights, whose selection biases are random too (transformers starts them at 0)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("router.bias", "e_score_correction_bias", "expert_bias")):
                tensor.normal_(std=0.1)
    return model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without the padding id 0."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def chosen_experts(moe: MoEModel, inputs: Tensor) -> dict[int, set[int]]:
    """{layer: the experts that the model chooses for inputs with a gate other than 0}."""
    chosen: dict[int, set[int]] = {layer: set() for layer in moe.blocks}

    def listen(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            index, gates = [*args, *kwargs.values()][1:3]
            chosen[layer].update(index[gates != 0].tolist())

        return hook

    hooks = [
        block.experts.register_forward_pre_hook(listen(layer), with_kwargs=True) for layer, block in moe.blocks.items()
    ]
    logits_of(moe.model, inputs)
    for hook in hooks:
        hook.remove()
    return chosen


def random_plan(
    moe: MoEModel, inputs: Tensor | None = None, *, seed: int = 0, ascending: bool = True, uniform: bool = False
) -> Plan:
    """A plan that drops random experts, another number in every layer where there is room for it.

    Groups of the router keep the same number each. With `ascending=False` the kept experts also change places. With
    `inputs`, every layer drops an expert that the model chooses for them, so that the plan changes their logits.
    """
    rng = random.Random(seed)
    chosen = chosen_experts(moe, inputs) if inputs is not None else {}
    counts = list(range(moe.min_experts, NUM_EXPERTS, moe.num_groups))[::-1]
    layers = {}
    for turn, layer in enumerate(moe.blocks):
        size_before = moe.counts[layer] // moe.num_groups
        size_after = counts[0 if uniform else turn % len(counts)] // moe.num_groups
        order: list[int] = []
        for group in range(moe.num_groups):
            members = range(group * size_before, (group + 1) * size_before)
            used = sorted(chosen.get(layer, set()).intersection(members))
            gone = [rng.choice(used)] if used else []
            kept = rng.sample([one for one in members if one not in gone], size_after)
            order += sorted(kept) if ascending else kept
        layers[layer] = LayerPlan(experts_before=moe.counts[layer], order=tuple(order))
    return Plan(layers=layers, criterion="random")


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a model is: its modules, parameters and hooks by identity, plain attributes, bytes, config and class."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks"):
                found[f"{path}:{key}"] = [(inner, id(one)) for inner, one in value.items()]
            elif isinstance(value, bool | int | float | str | tuple | list | None):
                found[f"{path}:{key}"] = value
    found |= {name: tensor.detach().clone().numpy().tobytes() for name, tensor in model.state_dict().items()}
    found["config"] = model.config.to_dict()
    found["class"] = type(model)
    return found
