"""The routers and losses of V-MoE against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.models.vmoe.losses import importance_loss, load_loss
from secateur.models.vmoe.routing import Pairs, Rules, capacity, route, seated

# Toy of the specification: probabilities (3 tokens, 3 experts) and the experts' outputs (expert, token, 2).
TOY = torch.tensor([[6.0, 3, 1], [1, 5, 4], [7, 2, 1]]) / 10
OUTPUTS = torch.tensor(
    [
        [[3.0, 4], [0, 1], [0, 2]],
        [[1.0, 0], [0, 2], [-3, 0]],
        [[7.0, 0], [8, 6], [0, 1]],
    ]
)
ONE_POOL = torch.zeros(3, dtype=torch.int64)


def combined(pairs: Pairs, outputs: Tensor) -> Tensor:
    """(T, 2) what the tokens get."""
    result = torch.zeros(outputs.shape[1], outputs.shape[2])
    for token, expert, gate in zip(pairs.token.tolist(), pairs.expert.tolist(), pairs.gate, strict=True):
        result[token] += gate * outputs[expert, token]
    return result


def met(logits: Any, rules: Rules, places: Sequence[int] | None = None, pool: Any = None) -> list[tuple[int, int]]:
    """(token, expert) of every pair."""
    scores = torch.as_tensor(logits, dtype=torch.float32)
    pools = torch.zeros(len(scores), dtype=torch.int64) if pool is None else torch.tensor(pool)
    pairs = route(scores, rules, pool=pools, places=None if places is None else torch.tensor(places))
    return list(zip(pairs.token.tolist(), pairs.expert.tolist(), strict=True))


@pytest.mark.parametrize(
    ("removal", "renormalise", "expected"),
    [
        ("full", True, [(7 / 3, 8 / 3), (32 / 9, 34 / 9), (-2 / 3, 14 / 9)]),
        ("full", False, [(2.1, 2.4), (3.2, 3.4), (-0.6, 1.4)]),
        ("zero slot", True, [(2, 8 / 3), (32 / 9, 8 / 3), (0, 14 / 9)]),
        ("zero slot", False, [(1.8, 2.4), (3.2, 2.4), (0, 1.4)]),
        ("re-route", True, [(25 / 7, 24 / 7), (6.4, 5.0), (0, 1.875)]),
        ("re-route", False, [(25 / 7, 24 / 7), (6.4, 5.0), (0, 1.875)]),
    ],
)
def test_what_tokens_get_when_the_second_expert_is_removed(
    removal: str, renormalise: bool, expected: list[tuple[float, float]]
) -> None:
    columns = [0, 2] if removal == "re-route" else [0, 1, 2]
    outputs = OUTPUTS.clone()
    outputs[1] *= removal == "full"
    pairs = route(TOY.log()[:, columns], Rules(top_k=2, renormalise=renormalise), pool=ONE_POOL)
    torch.testing.assert_close(combined(pairs, outputs[columns]), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_places_are_k_tokens_c_over_experts_rounded_and_at_least_one() -> None:
    assert capacity(100, 8, 2, 1.05) == 26  # 26.25
    assert capacity(10, 8, 2, 1.0) == 3  # 2.5
    assert capacity(9, 8, 2, 1.0) == 2  # 2.25
    assert capacity(4, 8, 1, 0.1) == 1  # 0.05


def test_everybody_takes_a_place_in_the_order_they_come() -> None:
    queue = torch.tensor([1, 0, 1, 1, 0, 2, 1])
    assert seated(queue, torch.tensor([1, 2, 0])).tolist() == [True, True, True, False, False, False, False]


def test_tokens_beyond_the_places_of_an_expert_are_dropped_in_the_order_of_tokens() -> None:
    assert met([[2, 0], [3, 0], [4, 0]], Rules(top_k=1), [2]) == [(0, 0), (1, 0)]


def test_first_choices_take_places_before_second_choices() -> None:
    # Expert 0 is the second choice of token 0 and the first of token 1, and so on.
    assert met([[2, 3, 0], [3, 0, 2], [0, 2, 3]], Rules(top_k=2), [1]) == [(0, 1), (1, 0), (2, 2)]
    assert met([[1, 2], [2, 1]], Rules(top_k=2)) == [(0, 1), (0, 0), (1, 0), (1, 1)]


def test_with_batch_priority_the_largest_weights_take_places_first() -> None:
    # Softmax of the logs is the numbers. Token 1 has the largest weight, token 2 the largest sum of two.
    weights = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.5, 0.45, 0.05]]).log()
    assert met(weights, Rules(top_k=2), [1])[0] == (0, 0)
    assert (1, 0) in met(weights, Rules(top_k=2, priority="max"), [1])
    assert (2, 0) in met(weights, Rules(top_k=2, priority="sum"), [1])


def test_weights_are_computed_in_float32_at_least() -> None:
    for given, found in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert route(TOY.to(given), Rules(top_k=1), pool=ONE_POOL).gate.dtype == found


def test_pools_have_places_of_their_own() -> None:
    logits = [[1, 0]] * 5
    assert met(logits, Rules(top_k=1), [1, 2], [0, 1, 0, 1, 1]) == [(0, 0), (1, 0), (3, 0)]


def test_a_tie_goes_to_the_expert_with_the_lower_number() -> None:
    assert met([[0.5] * 40], Rules(top_k=3)) == [(0, 0), (0, 1), (0, 2)]


def test_each_expert_takes_its_best_tokens() -> None:
    logits = TOY.log() + torch.tensor([[9.0], [0], [-9]])  # the same softmax over experts
    pairs = route(logits, Rules(expert_choice=True), pool=ONE_POOL, places=torch.tensor([1]))
    assert list(zip(pairs.token.tolist(), pairs.expert.tolist(), strict=True)) == [(1, 1), (1, 2), (2, 0)]
    torch.testing.assert_close(pairs.gate, torch.tensor([0.5, 0.4, 0.7]))


def test_weights_over_tokens_add_up_to_one_for_each_expert_and_pool() -> None:
    logits = torch.tensor([[0.0], [2.0], [1.0], [-1.0], [0.0]])
    rules = Rules(expert_choice=True, over_tokens=True)
    pairs = route(logits, rules, pool=torch.tensor([0, 0, 0, 1, 1]), places=torch.tensor([2, 2]))
    assert pairs.token.tolist() == [1, 2, 3, 4]
    high, low = 1 / (1 + torch.tensor(-1.0).exp()), 1 / (1 + torch.tensor(1.0).exp())
    torch.testing.assert_close(pairs.gate, torch.stack((high, low, low, high)))


@pytest.mark.parametrize("over_tokens", [True, False])
def test_both_removals_coincide_only_where_weights_are_taken_over_tokens(over_tokens: bool) -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    rules = Rules(expert_choice=True, over_tokens=over_tokens)
    pool, places = torch.arange(12) // 6, torch.tensor([3, 3])
    whole, cut = (route(logits[:, columns], rules, pool=pool, places=places) for columns in (range(5), [0, 2, 4]))
    live = whole.expert % 2 == 0
    zero_slot = (whole.token[live], whole.expert[live] // 2, whole.gate[live])
    re_routed = (cut.token, cut.expert, cut.gate)
    assert all(map(torch.equal, zero_slot, re_routed)) is over_tokens


def test_weights_have_a_gradient_and_the_choice_has_none() -> None:
    for rules in (Rules(top_k=2), Rules(expert_choice=True), Rules(expert_choice=True, over_tokens=True)):
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
        pairs = route(logits, rules, pool=torch.zeros(6, dtype=torch.int64), places=torch.tensor([2]))
        pairs.gate.square().sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.any()


def test_importance_loss_is_the_squared_variation_of_the_sums() -> None:
    # Sums 1.4, 1.0, 0.6: mean 1, variance 0.32 / 3.
    torch.testing.assert_close(importance_loss(TOY, ONE_POOL, 1), torch.tensor(0.32 / 3))
    twice = torch.cat((TOY, torch.full((2, 3), 1 / 3)))
    found = importance_loss(twice, torch.tensor([0, 0, 0, 1, 1]), 2)
    torch.testing.assert_close(found, torch.tensor(0.32 / 6))


def test_load_loss_is_the_squared_variation_of_the_chances_to_be_chosen() -> None:
    logits, noisy, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, -3.0]]), torch.tensor([0])
    # Threshold 1: Phi(0) = 0.5 and Phi(-1) = 0.1586553.
    torch.testing.assert_close(load_loss(logits, noisy, 1, 1.0, pool, 1, 2), torch.tensor(0.2685778))
    # With half the noise the second expert is two deviations away: Phi(-2) = 0.0227501.
    torch.testing.assert_close(load_loss(logits, noisy, 1, 0.5, pool, 1, 2), torch.tensor(0.8334956))
    assert load_loss(logits, noisy, 1, 1.0, pool, 1, 1) == 0
