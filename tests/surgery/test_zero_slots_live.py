"""Experts of a live model removed into zero slots: what it then computes, how it trains, and what it is to others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import SecateurError, remove_into_zero_slots_
from secateur.families import describe_moe, logits_of
from secateur.plans import MIXED, REROUTE, LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.oracle import barred_experts
from support.model_folders import loaded
from support.tiny_models import VOCABULARY, random_tokens, tiny_config, tiny_model
from support.zero_slot_models import TURNED, check_close, silenced_logits, zero_slot_plan

TOKENS = random_tokens(2, 12)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3 grouped", "gpt_oss"])
def test_it_computes_the_source_with_gates_of_0_and_loads_again(name: str, tmp_path: Path) -> None:
    model = tiny_model(name).eval()
    plan = zero_slot_plan(describe_moe(model).counts, TURNED)
    expected = silenced_logits(model, plan, TOKENS)
    assert not torch.allclose(expected, logits_of(model, TOKENS), atol=1e-4)
    routers = {key: value.clone() for key, value in model.state_dict().items() if "experts" not in key.split(".")}
    remove_into_zero_slots_(model, plan)
    found = logits_of(model, TOKENS)
    check_close(found, expected)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in routers.items())
    assert model.config.moe_config["kept_experts"] == {
        str(layer): list(one.order) for layer, one in plan.layers.items()
    }
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits_of(again, TOKENS), found)
    assert torch.equal(logits_of(copy.deepcopy(model), TOKENS), found)


def test_removing_twice_is_removing_at_once(tmp_path: Path) -> None:
    once, twice = tiny_model("qwen3_moe").eval(), tiny_model("qwen3_moe").eval()
    remove_into_zero_slots_(once, zero_slot_plan([0, 2], ((6, 1),)))
    remove_into_zero_slots_(twice, zero_slot_plan([0, 2], ((1, 3, 6),)))
    later = LayerPlan(experts_before=3, order=(2, 0))
    remove_into_zero_slots_(twice, Plan(layers=dict.fromkeys((0, 2), later), criterion="test"))
    assert torch.equal(logits_of(twice, TOKENS), logits_of(once, TOKENS))
    assert twice.config.moe_config == once.config.moe_config
    with pytest.raises(SecateurError, match="layer 0 is for 8 experts, the model has 2"):
        remove_into_zero_slots_(twice, zero_slot_plan([0, 2]))


def test_layers_that_differ_already_can_have_zero_slots() -> None:
    model = tiny_model("qwen3_moe").eval()
    prune_model_(describe_moe(model), Plan(layers={0: LayerPlan(experts_before=8, order=(1, 2, 5))}, criterion="test"))
    plan = Plan(layers={0: LayerPlan(experts_before=3, order=(2,))}, criterion="test")
    expected = silenced_logits(model, plan, TOKENS)
    remove_into_zero_slots_(model, plan)
    check_close(logits_of(model, TOKENS), expected)
    assert model.config.moe_config == {"per_layer_experts_blocks": [3, 8, 8], "kept_experts": {"0": [2]}}


def test_experts_that_change_places_and_change_back_are_where_they_were() -> None:
    model = tiny_model("qwen3_moe").eval()
    expected = silenced_logits(model, zero_slot_plan([1]), TOKENS)
    turned = {0: LayerPlan(experts_before=8, order=(1, 0, 2, 3, 4, 5, 6, 7))}
    remove_into_zero_slots_(model, Plan(layers=turned, criterion="test"))
    remove_into_zero_slots_(model, Plan(layers=turned | zero_slot_plan([1]).layers, criterion="test"))
    check_close(logits_of(model, TOKENS), expected)


def test_a_plan_that_changes_nothing_leaves_the_model_as_it_is() -> None:
    model = tiny_model("qwen3_moe")
    kind, config = type(model), model.config.to_dict()
    remove_into_zero_slots_(model, Plan.identity({0: 8, 1: 8, 2: 8}))
    assert type(model) is kind
    assert model.config.to_dict() == config


def test_every_expert_that_is_left_learns_and_so_do_the_routers() -> None:
    model = tiny_model("qwen3_moe").train()
    remove_into_zero_slots_(model, zero_slot_plan([0, 1, 2], ((5, 0, 3), (6, 2), (1, 2, 4, 7))))
    tokens = random_tokens(8, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    untouched = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert untouched == []


def test_zero_slots_have_no_part_in_the_balance_loss() -> None:
    model = tiny_model("mixtral").eval()
    kept = {0: (5, 0, 3), 1: (6,), 2: (1, 2, 4, 7)}
    remove_into_zero_slots_(model, zero_slot_plan(kept))
    output = model(input_ids=TOKENS, labels=TOKENS, output_router_logits=True)
    parts = []
    for layer, logits in enumerate(output.router_logits):
        assert logits.shape[-1] == 8
        count = len(kept[layer])
        shares = logits[:, sorted(kept[layer])].softmax(dim=-1)
        chosen = torch.zeros_like(shares).scatter(1, shares.topk(min(2, count)).indices, 1.0)
        parts.append(count * (chosen.mean(dim=0) * shares.mean(dim=0)).sum())
    torch.testing.assert_close(output.aux_loss, torch.stack(parts).mean())
    plain = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(output.loss, plain + model.router_aux_loss_coef * output.aux_loss)


def test_only_who_knows_of_zero_slots_is_told_of_them() -> None:
    model = tiny_model("qwen3_moe")
    remove_into_zero_slots_(model, zero_slot_plan([0]))
    with pytest.raises(SecateurError, match="the model has zero slots: its routers choose among experts of which some"):
        describe_moe(model)
    moe = describe_moe(model, zero_slots=True)
    assert (moe.counts, moe.slots, moe.kept) == ({0: 3, 1: 8, 2: 8}, {0: 8, 1: 8, 2: 8}, {0: (0, 3, 5)})
    assert (moe.num_groups, moe.min_experts) == (1, 1)
    assert moe.params_per_expert == {0: 3 * 24 * 32, 1: 3 * 24 * 32 + 32, 2: 3 * 24 * 32 + 32}
    with pytest.raises(SecateurError, match="the model has zero slots, and rows of its routers cannot be cut"):
        prune_model_(moe, Plan(layers={0: LayerPlan(experts_before=3, order=(0, 1))}, criterion="test"))


def test_rows_are_not_cut_by_a_plan_that_leaves_zero_slots_nor_the_other_way_round() -> None:
    moe = describe_moe(tiny_model("qwen3_moe"))
    plan = zero_slot_plan([0])
    with pytest.raises(SecateurError, match="its removed experts are 'zero-slot', expected 'reroute'"):
        prune_model_(moe, plan)
    with pytest.raises(SecateurError, match="expected 'reroute'"), barred_experts(moe, plan):
        pass
    with pytest.raises(SecateurError, match=r"its removed experts are 'reroute'; prune_model_ does that"):
        remove_into_zero_slots_(moe.model, zero_slot_plan([0], removed=REROUTE))
    with pytest.raises(SecateurError, match="its steps mean different things by removing an expert"):
        remove_into_zero_slots_(moe.model, zero_slot_plan([0], removed=MIXED))


def test_what_cannot_have_zero_slots_is_refused_and_stays_as_it_was() -> None:
    text: Any = AutoConfig.for_model("llama4_text", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1,
                                     intermediate_size=8, intermediate_size_mlp=8, num_attention_heads=4, head_dim=8,
                                     num_key_value_heads=2, num_local_experts=8, pad_token_id=0)  # fmt: skip
    with pytest.raises(SecateurError, match="'llama4_text' cannot be pruned"):
        remove_into_zero_slots_(AutoModelForCausalLM.from_config(text), zero_slot_plan([0]))
    with pytest.raises(SecateurError, match="expected a transformers model"):
        remove_into_zero_slots_(torch.nn.Linear(2, 2), zero_slot_plan([0]))
    with pytest.raises(SecateurError, match="layer 3 is not a MoE layer"):
        remove_into_zero_slots_(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")), zero_slot_plan([3]))
