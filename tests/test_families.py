"""What is found in a live model is the published layout of its family; what cannot be pruned is refused by name."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DbrxConfig, PreTrainedConfig

from secateur.errors import SecateurError
from secateur.families import REFUSED, describe_moe, router_needs
from secateur.modeling_secateur import LinearInCount, expert_count_key, find_expert_layout, probe_counts
from secateur.surgery.module import check_model, prune_model_
from support.tiny_models import FAMILIES, NUM_EXPERTS, TOP_K, random_plan, tiny_config, tiny_model

every_family = pytest.mark.parametrize("name", FAMILIES)


def number_of(config: PreTrainedConfig, dotted: str) -> int:
    value = config
    for key in dotted.split("."):
        value = getattr(value, key)
    return value


@every_family
def test_blocks_tensors_and_expert_axes_are_those_of_the_family(name: str) -> None:
    family = FAMILIES[name]
    moe = describe_moe(tiny_model(name))
    assert tuple(moe.blocks) == family.layers
    for layer, block in moe.blocks.items():
        path = family.block.replace("N", str(layer))
        assert (block.name, block.num_experts) == (path, NUM_EXPERTS)
        assert block.router is moe.model.get_submodule(f"{path}.{family.router}")
        assert block.experts is moe.model.get_submodule(f"{path}.experts")
        found = {spec.name.removeprefix(f"{path}."): dataclasses.astuple(spec.axis) for spec in block.tensors}
        assert found == {
            key: (dim, family.rows.get(key, 1), family.trailing.get(key, 0)) for key, dim in family.tensors.items()
        }
    assert (moe.top_k, moe.num_groups, moe.min_experts) == (TOP_K, family.num_groups, family.min_experts)
    assert moe.model_type == family.model_type
    assert number_of(moe.model.config, moe.count_key) == NUM_EXPERTS


@every_family
def test_parameters_per_expert_are_what_a_model_with_one_expert_less_lacks(name: str) -> None:
    family, step = FAMILIES[name], FAMILIES[name].num_groups
    moe = describe_moe(tiny_model(name))
    *parent, key = family.key.split(".")
    fields = {key: NUM_EXPERTS - step}
    if parent:
        fields = {parent[0]: {**tiny_config(name).to_dict()[parent[0]], **fields}}
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(tiny_config(name, **fields))
    lacking = moe.num_parameters - sum(parameter.numel() for parameter in smaller.parameters())
    assert sum(moe.params_per_expert.values()) * step == lacking


@pytest.mark.parametrize(
    ("n_group", "topk_group", "top_k", "expected"),
    [
        (1, 1, 3, (1, 3)),
        (4, 2, 2, (4, 8)),  # one expert a group would do for top-k, but a group is scored by its two best
        (4, 2, 6, (4, 12)),  # two groups hold six experts between them
        (4, 3, 7, (4, 12)),
    ],
)
def test_a_grouped_router_needs_two_experts_a_group_and_top_k_in_the_chosen_groups(
    n_group: int, topk_group: int, top_k: int, expected: tuple[int, int]
) -> None:
    config = tiny_config("deepseek_v3", n_group=n_group, topk_group=topk_group)
    assert router_needs(config, top_k) == expected


@every_family
def test_the_counts_that_a_layout_is_found_with_are_enough_for_the_router(name: str) -> None:
    config = tiny_config(name).get_text_config()
    least, more = probe_counts(config)
    assert router_needs(config, TOP_K)[1] <= least < more


def test_the_top_k_of_a_config_inside_another_is_found() -> None:
    assert probe_counts(DbrxConfig(ffn_config={"moe_num_experts": 16, "moe_top_k": 4})) == (4, 5)


def test_an_axis_with_fewer_entries_than_its_experts_need_is_refused_by_the_name_of_its_tensor() -> None:
    model = tiny_model("qwen3_moe")
    layout = describe_moe(model).layout
    name = next(iter(layout.tensors))
    wrong = LinearInCount(rows_per_expert=2, num_trailing=-NUM_EXPERTS)
    with pytest.raises(SecateurError, match=rf"^{name}: num_trailing is -{NUM_EXPERTS}, expected at least 0"):
        describe_moe(model, dataclasses.replace(layout, tensors={**layout.tensors, name: wrong}))


def test_layers_without_experts_and_shared_experts_are_left_out() -> None:
    moe = describe_moe(tiny_model("deepseek_v3"))
    assert 0 not in moe.blocks
    assert not any("shared" in tensor.name for block in moe.blocks.values() for tensor in block.tensors)


def test_a_pruned_model_is_described_with_its_own_counts() -> None:
    moe = describe_moe(tiny_model("qwen3_moe"))
    plan = random_plan(moe)
    prune_model_(moe, plan)
    again = describe_moe(moe.model)
    assert again.counts == {layer: one.experts_after for layer, one in plan.layers.items()}
    assert len(set(again.counts.values())) > 1
    assert again.model_type == "qwen3_moe"


REFUSED_MODELS = {
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8, "num_local_experts": 4},
    "jetmoe": {"intermediate_size": 24, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "longcat_flash": {"ffn_hidden_size": 24, "expert_ffn_hidden_size": 24, "n_routed_experts": 4, "zero_expert_num": 2},
    "deepseek_v4": {"moe_intermediate_size": 24, "n_routed_experts": 4},
    "zaya": {"num_experts": 4, "moe_intermediate_size": 24},
}


@pytest.mark.parametrize("model_type", REFUSED_MODELS)
def test_a_family_that_cannot_be_pruned_in_training_is_refused_by_name_with_the_reason(model_type: str) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **small, **REFUSED_MODELS[model_type])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SecateurError) as caught:
        describe_moe(model)
    assert repr(model_type) in str(caught.value)
    assert REFUSED[model_type] in str(caught.value)


def test_every_refused_family_is_tried() -> None:
    assert {*REFUSED_MODELS, "llama4"} == set(REFUSED)  # llama4 is llama4_text with pictures


def test_a_dense_model_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(SecateurError, match=r"'llama'.*number of routed experts"):
        describe_moe(AutoModelForCausalLM.from_config(config))


def test_a_model_whose_layers_are_all_dense_is_refused() -> None:
    with pytest.raises(SecateurError, match="no layer has routed experts"):
        describe_moe(tiny_model("deepseek_v3", first_k_dense_replace=3))


def test_experts_that_no_rule_covers_are_refused() -> None:
    config = AutoConfig.for_model(
        "doge", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, is_moe=True, num_experts=16, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(SecateurError, match="layer 0: expected one module named 'experts', found none"):
        describe_moe(AutoModelForCausalLM.from_config(config))


def test_a_config_with_two_expert_counts_is_refused() -> None:
    said_twice = tiny_config("mixtral", n_routed_experts=4)  # its class reads one of the two
    assert expert_count_key(said_twice) == "num_local_experts"

    class Both(type(said_twice)):  # type: ignore[misc]
        n_routed_experts: int = 4

    config = Both(n_routed_experts=4)
    with pytest.raises(ValueError, match=r"expected one config key.*'n_routed_experts', 'num_local_experts'"):
        expert_count_key(config)


def test_a_layout_that_is_not_linear_in_the_count_is_refused() -> None:
    config = tiny_config("mixtral")

    class Square(AutoModelForCausalLM._model_mapping[type(config)]):  # type: ignore[misc]
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.table = nn.Buffer(torch.zeros(config.num_local_experts, config.num_local_experts))

    with pytest.raises(ValueError, match=r"table changes in axes \[0, 1\]"):
        find_expert_layout(Square, config, (2, 3))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_refused(wrap: type) -> None:
    with pytest.raises(SecateurError, match="not a wrapper"):
        describe_moe(wrap(tiny_model("mixtral")))


def _compile_root(model: nn.Module) -> None:
    model.compile()


def _compile_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts.compile()


def _ask_for_router_logits(model: nn.Module) -> None:
    model.config.output_router_logits = True


def _share(model: nn.Module) -> None:
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    second.gate_up_proj = first.gate_up_proj


def _quantise(model: nn.Module) -> None:
    model.is_quantized = True


class Sharded(torch.Tensor):
    """Stands for DTensor and other tensor subclasses."""


def _shard(model: nn.Module) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Sharded))


UNFIT = {
    "the model is compiled": _compile_root,
    r"model\.layers\.1\.mlp\.experts is compiled": _compile_layer,
    r"layers\.1\.mlp\.experts\.gate_up_proj and .*layers\.0\.mlp\.experts\.gate_up_proj are one shared": _share,
    "quantised": _quantise,
    r"layers\.1\.mlp\.experts\.down_proj is a .*(Sharded|Parameter).*expected a plain tensor": _shard,
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_model_that_surgery_cannot_follow_is_refused(message: str) -> None:
    model = tiny_model("mixtral")
    check_model(describe_moe(model))
    UNFIT[message](model)
    with pytest.raises(SecateurError, match=message):
        check_model(describe_moe(model))


def test_a_balance_loss_that_knows_one_count_for_all_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    _ask_for_router_logits(model)
    check_model(describe_moe(model))
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "load_balancing_loss_func", lambda router_probs, expert_indices: 0)
    with pytest.raises(SecateurError, match="output_router_logits is on, and MixtralForCausalLM has a balance loss of"):
        check_model(describe_moe(model))


def test_layers_with_fewer_experts_than_the_router_needs_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"layer 0: 8 experts, but its router needs at least 9"):
        describe_moe(tiny_model("mixtral", num_experts_per_tok=9))


def test_tensors_of_one_layer_that_disagree_about_the_count_are_refused() -> None:
    model = tiny_model("mixtral")
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(gate.weight[:6].detach())
    with pytest.raises(SecateurError, match="layer 1: its tensors hold different numbers of experts"):
        describe_moe(model)


def test_a_stale_expert_count_in_a_module_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.num_experts = 7
    with pytest.raises(SecateurError, match=r"layers\.1\.mlp\.experts\.num_experts is 7, expected 8"):
        describe_moe(model)


def test_a_table_of_expert_ids_in_a_block_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[2].mlp.gate.tid2eid = nn.Buffer(torch.zeros(64, 2, dtype=torch.int64))
    with pytest.raises(SecateurError, match=r"tid2eid is a table of whole numbers"):
        describe_moe(model)
