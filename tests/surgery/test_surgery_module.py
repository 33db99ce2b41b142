"""Surgery on a live model: everything that depends on the expert count follows, and training goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.modeling_secateur import layer_of
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from support.tiny_models import (
    FAMILIES,
    NUM_EXPERTS,
    every_family,
    everything,
    random_plan,
    random_tokens,
    tiny_config,
    tiny_model,
)


def keep(*kept: int, layer: int = 0, experts_before: int = NUM_EXPERTS) -> Plan:
    return Plan(layers={layer: LayerPlan(experts_before=experts_before, order=kept)}, criterion="test")


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = random_tokens(2, 12, seed=seed)
    model.train()
    torch.manual_seed(seed)  # for router jitter
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def native_of(name: str, num_experts: int) -> PreTrainedModel:
    """The family's own model with this many experts in every layer, on no device."""
    *parent, key = FAMILIES[name].key.split(".")
    fields: dict[str, Any] = {key: num_experts}
    if parent:
        fields = {parent[0]: tiny_config(name).to_dict()[parent[0]] | fields}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(name, **fields))


def plain_values(module: nn.Module) -> dict[str, Any]:
    values = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | list)}
    values.pop("_is_hf_initialized", None)  # models on the meta device are not initialised
    return values


@every_family
def test_every_module_holds_the_numbers_and_shapes_of_a_native_model_with_its_count(name: str) -> None:
    moe = describe_moe(tiny_model(name))
    after = prune_model_(moe, random_plan(moe))
    natives = {count: native_of(name, count) for count in set(after.counts.values())}
    largest = max(natives)
    expected = {count: dict(model.named_modules()) for count, model in natives.items()}
    for path, module in after.model.named_modules():
        count = after.counts.get(layer_of(path), largest)  # type: ignore[arg-type]
        native = expected[count][path]
        assert plain_values(module) == plain_values(native), path
        for own, other in ((module._parameters, native._parameters), (module._buffers, native._buffers)):
            assert {k: v.shape for k, v in own.items() if v is not None} == {
                k: v.shape for k, v in other.items() if v is not None
            }, path


@every_family
def test_an_optimizer_step_after_pruning_equals_that_of_a_model_built_with_the_pruned_counts(name: str) -> None:
    model = tiny_model(name)
    optimizer = adamw(model)
    for seed in range(2):
        train_step(model, optimizer, seed)
    moe = describe_moe(model)
    prune_model_(moe, random_plan(moe, seed=4), optimizer)

    reference = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    reference.load_state_dict(model.state_dict(), strict=True)
    other = adamw(reference)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for seed in range(2, 4):
        train_step(model, optimizer, seed)
        train_step(reference, other, seed)
    trained, expected = model.state_dict(), reference.state_dict()
    assert [key for key in expected if not torch.equal(trained[key], expected[key])] == []
    pruned = {tensor.name for block in moe.blocks.values() for tensor in block.tensors if "bias" not in tensor.name}
    assert [key for key in pruned if torch.equal(trained[key], before[key])] == []


def test_rows_weights_moments_and_steps_are_those_of_the_kept_experts() -> None:
    model = tiny_model("gpt_oss")
    optimizer = adamw(model)
    train_step(model, optimizer, 0)
    old = {
        name: (parameter.detach().clone(), {key: value.clone() for key, value in optimizer.state[parameter].items()})
        for name, parameter in model.named_parameters()
    }
    order = {0: [5, 1, 2], 2: [0, 3, 4, 7]}
    layers = {layer: LayerPlan(experts_before=NUM_EXPERTS, order=tuple(one)) for layer, one in order.items()}
    moe = describe_moe(model)
    prune_model_(moe, Plan(layers=layers, criterion="test"), optimizer)
    for name, parameter in model.named_parameters():
        rows = order.get(layer_of(name)) if "mlp." in name else None  # type: ignore[arg-type]
        pick = slice(None) if rows is None else rows
        weight, state = old[name]
        assert torch.equal(parameter, weight[pick]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state["exp_avg"][pick]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], state["exp_avg_sq"][pick]), name
        assert torch.equal(optimizer.state[parameter]["step"], state["step"]), name


def test_the_optimizer_holds_the_very_parameters_of_the_pruned_model() -> None:
    model = tiny_model("deepseek_v3")
    optimizer = adamw(model)
    moe = describe_moe(model)
    prune_model_(moe, random_plan(moe), optimizer)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]


def test_model_modules_and_untouched_parameters_stay_the_same_objects() -> None:
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    modules = [id(module) for module in model.modules()]
    others = {name: id(p) for name, p in model.named_parameters() if "mlp" not in name or ".1." in name}
    after = prune_model_(describe_moe(model), keep(1, 2, 3))
    assert after.model is model
    assert [id(module) for module in model.modules()] == modules
    assert {name: id(p) for name, p in model.named_parameters() if name in others} == others
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_frozen_parameter_stays_frozen_and_marks_on_parameters_stay() -> None:
    model = tiny_model("mixtral")
    gate = model.model.layers[0].mlp.gate
    gate.weight.requires_grad_(False)
    gate.weight.mark = "kept"
    prune_model_(describe_moe(model), keep(1, 2, 3))
    assert not gate.weight.requires_grad
    assert gate.weight.mark == "kept"
    assert model.model.layers[0].mlp.experts.down_proj.requires_grad


def test_a_plan_that_keeps_everything_in_place_changes_nothing() -> None:
    moe = describe_moe(tiny_model("mixtral"))
    before = everything(moe.model)
    prune_model_(moe, Plan.identity(moe.counts))
    assert everything(moe.model) == before


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3 grouped", "dbrx", "inkling_text"])
def test_pruning_twice_equals_pruning_by_the_composed_plan(name: str) -> None:
    twice, once = describe_moe(tiny_model(name)), describe_moe(tiny_model(name))
    first = random_plan(twice, seed=5, ascending=False)
    between = prune_model_(twice, first)
    layer = max(between.counts, key=between.counts.__getitem__)
    size = between.counts[layer] // between.num_groups
    fewer = (between.min_experts if between.num_groups == 1 else between.counts[layer]) // between.num_groups
    order = [group * size + old for group in range(between.num_groups) for old in reversed(range(size - fewer, size))]
    second = Plan(
        layers={layer: LayerPlan(experts_before=between.counts[layer], order=tuple(order))}, criterion="again"
    )
    prune_model_(between, second)
    prune_model_(once, first.compose(second))
    mine, other = twice.model.state_dict(), once.model.state_dict()
    assert mine.keys() == other.keys()
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []
    assert twice.model.config.to_dict() == once.model.config.to_dict()
    assert describe_moe(twice.model).counts == describe_moe(once.model).counts


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    return model.config.to_dict()


@every_family
def test_a_uniform_result_keeps_the_native_class_and_config(name: str) -> None:
    model = tiny_model(name)
    native, config = type(model), type(model.config)
    moe = describe_moe(model)
    plan = random_plan(moe, uniform=True)
    after = prune_model_(moe, plan)
    count = next(iter(plan.layers.values())).experts_after
    assert set(after.counts.values()) == {count}
    assert (type(model), type(model.config)) == (native, config)
    expected = native_of(name, count).config.to_dict()
    assert config_of(model) == expected | {"dtype": config_of(model)["dtype"]}


@every_family
def test_layers_that_differ_make_the_pruned_class_and_the_list_of_counts(name: str) -> None:
    model = tiny_model(name)
    native = type(model)
    moe = describe_moe(model)
    after = prune_model_(moe, random_plan(moe))
    assert type(model).__name__ == f"Pruned{native.__name__}"
    assert isinstance(model, native)
    assert model.config.model_type == "secateur_moe"
    assert model.config.base_model_type == FAMILIES[name].model_type
    blocks = model.config.moe_config["per_layer_experts_blocks"]
    assert blocks == [after.counts.get(layer, 0) for layer in range(model.config.num_hidden_layers)]
    assert sum(map(bool, blocks)) == len(FAMILIES[name].layers)


def test_a_model_that_becomes_uniform_again_goes_back_to_its_native_class() -> None:
    model = tiny_model("qwen3_moe")
    native, config = type(model), type(model.config)
    fields = set(config_of(model))
    moe = prune_model_(describe_moe(model), keep(0, 1, 2, 3))
    assert type(model) is not native
    layers = {layer: LayerPlan(experts_before=NUM_EXPERTS, order=(4, 5, 6, 7)) for layer in (1, 2)}
    moe = prune_model_(moe, Plan(layers=layers, criterion="rest"))
    assert (type(model), type(model.config)) == (native, config)
    assert set(config_of(model)) == fields
    assert model.config.num_local_experts == model.num_experts == 4
    assert moe.counts == {0: 4, 1: 4, 2: 4}


WRONG_PLANS = {
    "layer 5 is not a MoE layer": ("mixtral", keep(0, 1, layer=5)),
    "layer 0 is not a MoE layer; MoE layers are": ("deepseek_v3", keep(0, 1)),
    "layer 1 is for 16 experts, the model has 8": ("mixtral", keep(0, 1, layer=1, experts_before=16)),
    "layer 2 keeps 1 experts, its router needs 2": ("mixtral", keep(4, layer=2)),
    "layer 1 keeps 2 experts, its router needs 4": ("deepseek_v3 grouped", keep(0, 4, layer=1)),
    "layer 1 has 2 router groups; each must keep the same number": (
        "deepseek_v3 grouped",
        keep(0, 1, 2, 4, 5, 6, 7, layer=1),
    ),
    "layer 2 has 2 router groups": ("deepseek_v3 grouped", keep(0, 1, 2, 4, layer=2)),
    r"found the groups \[0, 1, 0, 1\]": ("deepseek_v3 grouped", keep(0, 4, 1, 5, layer=2)),
    r"found the groups \[1, 1, 0, 0\]": ("deepseek_v2 grouped", keep(4, 5, 0, 1, layer=2)),
}


@pytest.mark.parametrize("message", WRONG_PLANS)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_changed(message: str) -> None:
    name, wrong = WRONG_PLANS[message]
    model = tiny_model(name)
    optimizer = adamw(model)
    train_step(model, optimizer, 0)
    moe = describe_moe(model)
    good = LayerPlan(experts_before=NUM_EXPERTS, order=tuple(range(4)) if moe.num_groups == 1 else (0, 1, 4, 5))
    plan = Plan(layers={1: good} | wrong.layers, criterion="test")
    before, state = everything(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SecateurError, match=message):
        prune_model_(moe, plan, optimizer)
    assert everything(model) == before
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(torch.equal(after["state"][i]["exp_avg"], state["state"][i]["exp_avg"]) for i in state["state"])


def test_an_optimizer_without_a_rule_is_refused_and_nothing_is_changed() -> None:
    model = tiny_model("mixtral")
    optimizer = torch.optim.NAdam(model.parameters())
    before = everything(model)
    with pytest.raises(SecateurError, match="NAdam"):
        prune_model_(describe_moe(model), keep(0, 1), optimizer)
    assert everything(model) == before


def test_gradients_of_pruned_parameters_are_dropped_and_the_rest_stay() -> None:
    model = tiny_model("mixtral")
    tokens = random_tokens(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    prune_model_(describe_moe(model), keep(0, 1, 2))
    assert model.model.layers[0].mlp.experts.down_proj.grad is None
    assert model.model.layers[1].mlp.experts.down_proj.grad is not None


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_the_experts_runs_the_pruned_model(implementation: str) -> None:
    moe = describe_moe(tiny_model("qwen3_moe"))
    prune_model_(moe, random_plan(moe))
    tokens = random_tokens(2, 8)
    moe.model.set_experts_implementation("eager")
    expected = logits_of(moe.model, tokens)
    moe.model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits_of(moe.model, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_kept(dtype: torch.dtype) -> None:
    model = tiny_model("gpt_oss").to(dtype)
    prune_model_(describe_moe(model), keep(0, 1, 2))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
