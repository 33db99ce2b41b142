"""What BAM's layers compute: the identities of the method, in float64 up to its rounding (arXiv 2408.08274)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.families import logits_of
from secateur.models.bam import BamForCausalLM
from secateur.models.bam.attention import BamAttention
from support.tiny_bam import (
    COMMON,
    attend_one,
    every_kind,
    output_of,
    positions,
    random_hidden,
    random_ids,
    tiny_bam,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# The loop knows neither a window nor other forms of RoPE; the parents of test_bam_parents.py have them.
WHOLE: dict[str, Any] = {"sliding_window": None, "rope_interleaved": False, "rope_parameters": None}


def attention_of(model: BamForCausalLM) -> BamAttention:
    attention: BamAttention = model.model.layers[1].self_attn
    return attention


def run(model: BamForCausalLM, hidden: Tensor) -> Tensor:
    """(B, L, D) of the attention of the second layer."""
    with torch.no_grad():
        outputs: Tensor = attention_of(model)(hidden, positions(model, hidden))[0]
    return outputs


def gates_of(attention: BamAttention, hidden: Tensor) -> Tensor:
    """(B, L, N)."""
    assert attention.router is not None
    gates: Tensor = attention.router(hidden)[1]
    return gates.unflatten(0, hidden.shape[:2])


def ffn(model: BamForCausalLM, expert: int, hidden: Tensor) -> Tensor:
    """One gated FFN without biases."""
    experts: Any = model.model.layers[1].mlp.experts
    gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    inner: Tensor = nn.functional.silu(gate) * up
    return inner @ experts.down_proj[expert].T


@torch.no_grad()
def make_equal_(model: BamForCausalLM) -> BamForCausalLM:
    """Give all experts of every layer the weights of the first."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, parameter in [*attention.named_parameters(), *layer.mlp.experts.named_parameters()]:
            if "router" in name:
                continue
            dim = 1 if name == "o_proj.weight" else 0
            shared = name[:2] in ("k_", "v_") and not model.config.kv_experts
            number = 1 if shared else attention.num_attention_experts
            first = parameter.unflatten(dim, (number, -1)).select(dim, 0)
            parameter.copy_(torch.cat([first] * number, dim=dim).view_as(parameter))
    return model


@every_kind
def test_all_heads_in_one_call_are_the_loop_over_experts_with_weights_before_or_after_the_output(kind: str) -> None:
    model, hidden = tiny_bam(kind, **WHOLE), random_hidden(2, 7)
    attention = attention_of(model)
    before, after = torch.zeros_like(hidden), torch.zeros_like(hidden)
    gates = gates_of(attention, hidden)
    for expert in range(attention.num_attention_experts):
        heads = attend_one(attention, expert, hidden, *positions(model, hidden))
        weight, bias = output_of(attention, expert)
        gate = gates[..., expert, None]
        before += (heads * gate) @ weight.T + gate * bias
        after += gate * (heads @ weight.T + bias)
    torch.testing.assert_close(run(model, hidden), after, **EXACT)
    torch.testing.assert_close(before, after, **EXACT)


@pytest.mark.parametrize("kind", ["own keys", "shared keys"])
def test_equal_attention_experts_are_one_attention_for_any_router(kind: str) -> None:
    model, hidden = make_equal_(tiny_bam(kind)), random_hidden(2, 7)
    attention = attention_of(model)
    weight, bias = output_of(attention, 0)
    alone = attend_one(attention, 0, hidden, *positions(model, hidden)) @ weight.T + bias
    for std in (0.0, 0.5, 5.0):
        assert attention.router is not None
        nn.init.normal_(attention.router.weight, std=std)
        torch.testing.assert_close(run(model, hidden), alone, **EXACT)


def test_equal_ffn_experts_are_the_ffn_times_the_largest_probability() -> None:
    model, hidden = make_equal_(tiny_bam("own keys")), random_hidden(2, 7)
    moe = model.model.layers[1].mlp
    largest = (hidden @ moe.gate.weight.T).softmax(-1).amax(-1, keepdim=True)
    dense = ffn(model, 0, hidden)
    torch.testing.assert_close(moe(hidden), largest * dense, **EXACT)
    assert not torch.allclose(moe(hidden), dense)
    nn.init.zeros_(moe.gate.weight)
    torch.testing.assert_close(moe(hidden), dense / 3, **EXACT)  # a near-zero router divides the branch by N


def test_a_renormalised_top_1_is_the_ffn_and_sends_the_router_no_gradient() -> None:
    ids = random_ids(2, 7)
    for renormalise in (True, False):
        model = make_equal_(tiny_bam("own keys", renormalise_top1=renormalise, output_router_logits=False)).train()
        hidden, moe = random_hidden(2, 7), model.model.layers[1].mlp
        assert torch.allclose(moe(hidden), ffn(model, 0, hidden), **EXACT) is renormalise
        model(ids, labels=ids).loss.backward()
        grads = [layer.mlp.gate.weight.grad for layer in model.model.layers]
        assert all(grad is None or not grad.any() for grad in grads) is renormalise
        assert model.model.layers[0].mlp.experts.down_proj.grad.any()


def test_with_a_renormalised_top_1_the_routers_losses_still_reach_the_router() -> None:
    model, ids = tiny_bam("own keys", renormalise_top1=True).train(), random_ids(2, 7)
    model(ids, labels=ids).loss.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


def test_the_chosen_weights_are_renormalised_for_more_than_one_expert_too() -> None:
    hidden = random_hidden(5)
    _, plain, experts = tiny_bam("sparse").model.layers[1].mlp.gate(hidden)
    _, whole, same = tiny_bam("sparse", renormalise_top1=True).model.layers[1].mlp.gate(hidden)
    assert torch.equal(experts, same)
    torch.testing.assert_close(whole, plain / plain.sum(-1, keepdim=True), **EXACT)


def test_with_one_expert_of_each_kind_both_routers_are_constant() -> None:
    model, hidden = tiny_bam("own keys", num_experts=1), random_hidden(2, 7)
    attention = attention_of(model)
    assert attention.router is None
    heads = attend_one(attention, 0, hidden, *positions(model, hidden))
    torch.testing.assert_close(run(model, hidden), heads @ attention.o_proj.weight.T, **EXACT)
    torch.testing.assert_close(model.model.layers[1].mlp(hidden), ffn(model, 0, hidden), **EXACT)


@pytest.mark.parametrize("kind", ["own keys", "shared keys"])
def test_shared_keys_are_keys_of_their_own_that_are_equal(kind: str) -> None:
    shared, own = tiny_bam(kind, kv_experts=False), tiny_bam(kind, kv_experts=True)
    repeated = {}
    for name, tensor in shared.state_dict().items():
        wanted = own.state_dict()[name].shape
        repeated[name] = torch.cat([tensor] * (wanted[0] // tensor.shape[0])) if tensor.shape != wanted else tensor
    own.load_state_dict(repeated)
    ids = random_ids(2, 7)
    torch.testing.assert_close(logits_of(own, ids), logits_of(shared, ids), rtol=1e-11, atol=1e-12)


def test_the_average_of_the_attentions_is_not_their_mixture_in_equal_parts() -> None:
    model, hidden = tiny_bam("own keys"), random_hidden(2, 7)
    attention = attention_of(model)
    assert attention.router is not None
    nn.init.zeros_(attention.router.weight)
    averaged = tiny_bam("own keys", num_attention_experts=1)  # as BTX has it
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            mean = attention.get_parameter(f"{name}.weight").unflatten(0, (3, -1)).mean(0)
            attention_of(averaged).get_parameter(f"{name}.weight").copy_(mean)
        mean = attention.o_proj.weight.unflatten(1, (3, -1)).mean(1)
        attention_of(averaged).o_proj.weight.copy_(mean)
    assert (run(averaged, hidden) - run(model, hidden)).abs().max() > 0.05


@every_kind
def test_experts_that_change_places_with_their_rows_of_the_router_change_nothing(kind: str) -> None:
    model, ids = tiny_bam(kind), random_ids(2, 7)
    expected = logits_of(model, ids)
    config, orders = model.config, {3: [2, 0, 1], 4: [3, 0, 1, 2]}
    with torch.no_grad():
        for layer in model.model.layers:
            for name, parameter in [*layer.self_attn.named_parameters(), *layer.mlp.named_parameters()]:
                shared = name[:2] in ("k_", "v_") and not config.kv_experts
                number = config.num_experts if name.startswith(("gate", "experts")) else config.num_attention_experts
                if not shared:
                    dim = 1 if name == "o_proj.weight" else 0
                    moved = parameter.unflatten(dim, (number, -1)).index_select(dim, torch.tensor(orders[number]))
                    parameter.copy_(moved.reshape(parameter.shape))
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-11, atol=1e-12)


def test_the_probabilities_of_every_token_add_up_to_1() -> None:
    hidden = random_hidden(2, 7)
    soft = attention_of(tiny_bam("own keys"))
    torch.testing.assert_close(gates_of(soft, hidden).sum(-1), torch.ones(2, 7, dtype=torch.float64), **EXACT)
    logits, weights, _ = tiny_bam("own keys").model.layers[0].mlp.gate(hidden)
    assert (weights < 1).all()
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(14, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(logits.softmax(-1).amax(-1), weights[:, 0], **EXACT)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_sparse_attention_keeps_the_largest_weights_as_they_are(top_k: int) -> None:
    hidden = random_hidden(2, 7)
    soft, sparse = (
        gates_of(attention_of(tiny_bam("own keys", attention_top_k=number)), hidden) for number in (None, top_k)
    )
    kept = sparse > 0
    assert (kept.sum(-1) == top_k).all()
    assert torch.equal(sparse[kept], soft[kept])
    assert (soft.where(kept, 2.0).amin(-1) >= soft.where(~kept, -1.0).amax(-1)).all()


def test_every_expert_has_a_part_in_the_tiny_models() -> None:
    """The identities above would hold of experts that nobody uses as well."""
    hidden = random_hidden(8, 16)
    for kind in ("own keys", "sparse"):
        for layer in tiny_bam(kind).model.layers:
            assert len(layer.mlp.gate(hidden)[2].unique()) == layer.mlp.experts.num_experts
    assert COMMON["num_key_value_heads"] > 1
