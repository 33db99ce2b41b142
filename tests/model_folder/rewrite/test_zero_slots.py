"""Experts with zero slots: what a module of them computes, and what the config of such a model must say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from secateur.modeling_secateur import kept_in, skipping_class

NUM_SLOTS, TOP_K, WIDTH = 6, 3, 16
# Spec section E.2: tokens t1, t2, t3; logits are the logs of WEIGHTS, and OUTPUTS[expert, token] is f_j(x_t).
WEIGHTS = torch.tensor([[6.0, 3, 1], [1, 5, 4], [7, 2, 1]])
OUTPUTS = torch.tensor([[[3.0, 4], [0, 1], [0, 2]], [[1, 0], [0, 2], [-3, 0]], [[7, 0], [8, 6], [0, 1]]])


class ToyExperts(nn.Module):
    """The experts of the spec; a token is the one-hot vector of its number, so that the toy fits real routers."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = self.outputs[top_k_index, hidden_states.argmax(dim=-1)[:, None]]  # (T, K, 2)
        total = (found * top_k_weights[..., None]).sum(dim=1)
        return torch.cat((total, torch.zeros(len(total), 1)), dim=-1)  # as wide as a token


def holding(experts: nn.Module, kept: tuple[int, ...], num_slots: int) -> Any:
    """The same module, as one that holds the experts of `kept` slots."""
    skipping: Any = copy.deepcopy(experts)
    skipping.__class__ = skipping_class(type(experts))
    skipping.kept_slots, skipping.num_slots = kept, num_slots
    return skipping


ROUTERS = {
    "renormalised": (MixtralTopKRouter, MixtralConfig(hidden_size=3, num_local_experts=3, num_experts_per_tok=2)),
    "raw": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(hidden_size=3, num_experts=3, num_experts_per_tok=2, norm_topk_prob=False),
    ),
}


@pytest.mark.parametrize(
    ("gates", "removed", "expected"),
    [
        ("renormalised", False, [(7 / 3, 8 / 3), (32 / 9, 34 / 9), (-2 / 3, 14 / 9)]),
        ("renormalised", True, [(2, 8 / 3), (32 / 9, 8 / 3), (0, 14 / 9)]),
        ("raw", False, [(2.1, 2.4), (3.2, 3.4), (-0.6, 1.4)]),
        ("raw", True, [(1.8, 2.4), (3.2, 2.4), (0, 1.4)]),
    ],
)
@pytest.mark.parametrize("kept", [(0, 2), (2, 0)], ids=["in order", "re-ordered"])
def test_the_published_numbers_when_the_second_expert_is_removed(
    gates: str, removed: bool, expected: list[tuple[float, float]], kept: tuple[int, ...]
) -> None:
    router_class, config = ROUTERS[gates]
    router: Any = router_class(config)
    with torch.no_grad():
        router.weight.copy_(WEIGHTS.log().T)
    tokens = torch.eye(3)
    _, chosen, slots = router(tokens)
    assert [set(row) for row in slots.tolist()] == [{0, 1}, {1, 2}, {0, 1}]
    experts: Any = holding(ToyExperts(OUTPUTS[list(kept)]), kept, 3) if removed else ToyExperts(OUTPUTS)
    found = experts(tokens, slots, chosen)[:, :2]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def real_experts(implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> MixtralExperts:
    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=8, num_local_experts=NUM_SLOTS)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts.to(dtype)


def cut(experts: MixtralExperts, kept: tuple[int, ...]) -> Any:
    """`experts` without those of other slots."""
    fewer = holding(experts, kept, NUM_SLOTS)
    for name, parameter in experts.named_parameters():
        setattr(fewer, name, nn.Parameter(parameter.detach()[list(kept)]))
    fewer.num_experts = len(kept)
    return fewer


def call(num_tokens: int = 40, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(T, D) tokens, (T, K) different slots of each, and gates in float32, as routers make them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    slots = torch.stack([torch.randperm(NUM_SLOTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return tokens, slots, torch.rand(num_tokens, TOP_K, generator=generator)


def dead(slots: Tensor, kept: tuple[int, ...]) -> Tensor:
    return ~torch.isin(slots, torch.tensor(kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 3, 5), (5, 0, 3), (1, 4), (2,)])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_the_result_is_that_of_all_experts_with_gates_of_0(
    dtype: torch.dtype, kept: tuple[int, ...], num_tokens: int
) -> None:
    whole = real_experts(dtype=dtype)
    tokens, slots, gates = call(num_tokens, dtype=dtype)
    expected = whole(tokens, slots, gates.masked_fill(dead(slots, kept), 0))
    found = cut(whole, kept)(tokens, slots, gates)
    assert found.dtype == dtype
    # Only to rounding: vectors of activations of another length may round otherwise.
    torch.testing.assert_close(found, expected)
    alone = dead(slots, kept).all(dim=1)
    assert not found[alone].any()
    assert bool(found[~alone].any(dim=1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [(0, 3, 5), (1, 4), (2,)])
def test_what_is_left_is_bit_for_bit_what_the_same_experts_add_among_all(
    dtype: torch.dtype, kept: tuple[int, ...]
) -> None:
    whole = real_experts(dtype=dtype)
    tokens, slots, gates = call(dtype=dtype)
    parts = torch.zeros(*slots.shape, WIDTH)  # as wide as the gates, until they are added up
    live = ~dead(slots, kept)
    token, turn = live.nonzero().unbind(dim=1)
    alone = whole(tokens[token], slots[live][:, None], torch.ones(len(token), 1))
    parts[token, turn] = alone * gates[live][:, None]
    assert torch.equal(cut(whole, kept)(tokens, slots, gates), parts.sum(dim=1).to(dtype))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_experts_functions_agree_to_rounding(implementation: str) -> None:
    whole = real_experts(implementation)
    tokens, slots, gates = call()
    expected = whole(tokens, slots, gates.masked_fill(dead(slots, (5, 0, 3)), 0))
    torch.testing.assert_close(cut(whole, (5, 0, 3))(tokens, slots, gates), expected, atol=1e-5, rtol=1e-5)


def test_the_shape_and_the_names_of_a_call_may_be_those_of_any_family() -> None:
    experts = cut(real_experts(), (5, 0, 3))
    tokens, slots, gates = call(12)
    expected = experts(tokens, slots, gates)
    assert torch.equal(experts(tokens, top_k_weights=gates, top_k_index=slots), expected)
    assert torch.equal(experts(tokens.view(3, 4, WIDTH), slots, gates), expected.view(3, 4, WIDTH))
    assert torch.equal(experts(tokens, slots.int(), gates), expected)


def test_only_live_slots_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = cut(real_experts(), (5, 0, 3))
    tokens, slots, gates = call()
    seen: list[tuple[int, ...]] = []
    native = MixtralExperts.forward

    def watched(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.append((*hidden.shape, index.shape[1]))
        result: Tensor = native(self, hidden, index, weights)
        return result

    monkeypatch.setattr(MixtralExperts, "forward", watched)
    experts(tokens, slots, gates)
    live = int((~dead(slots, (5, 0, 3))).sum())
    assert seen == [(live, WIDTH, 1)]
    assert 0 < live < slots.numel()
    experts(tokens, torch.full_like(slots, 1), gates)
    assert len(seen) == 1, "without live slots the experts need not run"


def test_without_live_slots_everything_is_0_and_training_goes_on() -> None:
    experts = cut(real_experts(), (1, 4))
    tokens, slots, gates = call()
    tokens.requires_grad_(True)
    result = experts(tokens, torch.zeros_like(slots), gates)
    assert torch.equal(result, torch.zeros_like(tokens))
    (tokens + result).sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_gradients_are_those_of_all_experts_with_gates_of_0_and_dead_gates_have_none() -> None:
    kept, whole = (5, 0, 3), real_experts("eager", torch.float64)  # grouped_mm knows no float64
    fewer = cut(whole, kept)
    tokens, slots, gates = call(dtype=torch.float64)
    removed = dead(slots, kept)
    grads = []
    for experts in (whole, fewer):
        inputs = tokens.clone().requires_grad_(True), gates.clone().requires_grad_(True)
        used = inputs[1].masked_fill(removed, 0) if experts is whole else inputs[1]
        experts(inputs[0], slots, used).square().sum().backward()
        grads.append([one.grad for one in inputs])
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
    assert not grads[1][1][removed].any()
    assert bool(grads[1][1][~removed].all())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(getattr(fewer, name).grad, parameter.grad[list(kept)])


def test_a_copy_computes_the_same() -> None:
    experts = cut(real_experts(), (5, 0, 3))
    assert torch.equal(copy.deepcopy(experts)(*call()), experts(*call()))
    assert type(experts).__name__ == "PrunedMixtralExperts"
    assert isinstance(experts, MixtralExperts)


def test_experts_that_are_called_otherwise_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Llama4TextExperts is called with \['hidden_states'\], expected tokens, the"):
        skipping_class(Llama4TextExperts)


def test_experts_that_are_split_over_ranks_are_refused() -> None:
    experts = cut(real_experts(), (1, 4))
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="PrunedMixtralExperts: experts with zero slots cannot be split over ranks"):
        experts(*call())


def config_with(**moe_config: Any) -> MixtralConfig:
    return MixtralConfig(num_hidden_layers=3, moe_config={"per_layer_experts_blocks": [4, 0, 6]} | moe_config)


def test_a_config_says_which_slots_have_an_expert() -> None:
    assert kept_in(MixtralConfig()) == {}
    assert kept_in(config_with()) == {}
    assert kept_in(config_with(kept_experts={"0": [3, 1], "2": [5]})) == {0: (3, 1), 2: (5,)}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([3, 1], r"expected some of the layers 0, 2, found \[3, 1\]"),
        ({"1": [0]}, "expected some of the layers 0, 2"),
        ({"00": [0]}, "expected some of the layers 0, 2"),
        ({"0": []}, r"layer 0 has \[\], expected different slots from 0 to 3, at least one"),
        ({"0": [4]}, r"layer 0 has \[4\]"),
        ({"0": [-1]}, r"layer 0 has \[-1\]"),
        ({"0": [1, 1]}, r"layer 0 has \[1, 1\]"),
        ({"0": [True]}, r"layer 0 has \[True\]"),
        ({"0": 3}, "layer 0 has 3"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused(kept: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_in(config_with(kept_experts=kept))
