"""The criteria without data: golden numbers, and sums that do not care in which pieces weights are read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.criteria import CRITERIA, weights
from secateur.criteria.score import score_layers, zero_weights
from secateur.criteria.weights import NO_WEIGHT, WeightStats
from secateur.errors import SecateurError

EXAMPLE = torch.tensor([[1, -1, 1, 1, 1, -1], [3, 0, 0, 0, 0, 0], [1, 2, 2, 0, 0, 2]], dtype=torch.float64)
ROUTER = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -2.0]])
BY_WEIGHTS = [name for name, one in CRITERIA.items() if one.needs in ("expert weights", "router weights")]


def scores_of(name: str, stats: WeightStats) -> list[float]:
    found = score_layers(name, {0: stats.num_experts}, weights={0: stats})[0]
    assert found.dtype == torch.float64
    return [float(score) for score in found]


def both(experts: Tensor, router: Tensor = ROUTER) -> WeightStats:
    return WeightStats.of_experts("experts", experts) + WeightStats.of_router("router", router)


def test_scores_are_those_worked_out_by_hand() -> None:
    stats = both(EXAMPLE)
    assert [round(-score, 6) for score in scores_of("aimer", stats)] == [1.0, 0.408248, 0.792594]
    assert scores_of("weight_norm", stats) == pytest.approx([math.sqrt(6), 3, math.sqrt(13)])
    assert scores_of("router_row_norm", stats) == pytest.approx([5, 1, 2])


def test_aimer_prunes_1_then_3_then_2() -> None:
    scores = scores_of("aimer", both(EXAMPLE))
    assert sorted(range(3), key=scores.__getitem__) == [0, 2, 1]


def test_aimer_of_gaussian_weights_is_the_mean_magnitude_of_a_normal_variable() -> None:
    experts = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    assert scores_of("aimer", WeightStats.of_experts("w", experts)) == pytest.approx([-0.7979] * 2, abs=0.003)


def test_an_expert_of_zeros_goes_first_and_is_named() -> None:
    stats = both(torch.cat([EXAMPLE, torch.zeros(1, 6)]), torch.ones(4, 2))
    scores = scores_of("aimer", stats)
    assert scores[-1] == NO_WEIGHT < min(scores[:-1])
    assert zero_weights({7: stats, 8: both(EXAMPLE)}) == {7: (3,)}


def test_aimer_does_not_change_when_an_expert_is_scaled() -> None:
    scaled = EXAMPLE * torch.tensor([[1e-6], [7.0], [1e6]])
    assert scores_of("aimer", both(scaled)) == pytest.approx(scores_of("aimer", both(EXAMPLE)), rel=1e-12)
    assert scores_of("weight_norm", both(scaled)) != pytest.approx(scores_of("weight_norm", both(EXAMPLE)))


@pytest.mark.parametrize("name", BY_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pieces_of_a_layer_score_like_the_whole(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    up, down = (torch.randn(4, 6, 5, generator=rng).to(dtype) for _ in range(2))
    router = torch.randn(4, 5, generator=rng).to(dtype)
    whole = WeightStats.of_experts("both", torch.cat([up, down], dim=1)) + WeightStats.of_router("router", router)
    monkeypatch.setattr(weights, "CHUNK", 7)
    pieces = WeightStats.of_router("router", router[2:], first=2, num_experts=4)
    pieces += WeightStats.of_router("router", router[:2], num_experts=4)
    for tensor in (up, down):
        for expert in (3, 0, 2, 1):
            pieces += WeightStats.of_experts("w", tensor[expert][None], first=expert, num_experts=4)
    assert pieces.num_weights.tolist() == [60] * 4
    assert scores_of(name, pieces) == pytest.approx(scores_of(name, whole), rel=1e-12)


def test_sums_are_taken_in_float64() -> None:
    experts = torch.full((1, 3, 1000), 0.1, dtype=torch.bfloat16)
    stats = WeightStats.of_experts("w", experts)
    assert float(stats.absolute_sum) == pytest.approx(3000 * float(experts[0, 0, 0]), rel=1e-12)


def test_random_scores_depend_on_seed_and_layer_only() -> None:
    scores = score_layers("random", {0: 8, 5: 8}, seed=3)
    assert scores[5].tolist() == score_layers("random", {5: 8}, seed=3)[5].tolist()
    assert scores[5].tolist() != scores[0].tolist()
    assert scores[5].tolist() != score_layers("random", {5: 8}, seed=4)[5].tolist()
    # the same on every machine
    assert score_layers("random", {0: 2}, seed=0)[0].tolist() == pytest.approx(
        [0.006551141571716768, 0.005937181867443853], abs=0
    )
    everything = torch.cat(list(score_layers("random", dict.fromkeys(range(50), 40), seed=1).values()))
    assert float(everything.min()) >= 0
    assert float(everything.max()) < 1
    assert float(everything.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int8), r"blocks\.w has type torch.int8, expected floating point"),
        (torch.tensor([[1.0, float("nan")]]), r"blocks\.w has entries that are not finite"),
        (torch.tensor([[1.0, float("-inf")]]), r"blocks\.w has entries that are not finite"),
    ],
)
def test_unusable_weights_are_refused_by_name(tensor: Tensor, message: str) -> None:
    for read in (WeightStats.of_experts, WeightStats.of_router):
        with pytest.raises(SecateurError, match=message):
            read("blocks.w", tensor)


@pytest.mark.parametrize("first", [-1, 3])
def test_experts_outside_the_layer_are_refused(first: int) -> None:
    with pytest.raises(SecateurError, match=rf"w: holds experts {first} to {first + 1}, expected 0 to 3"):
        WeightStats.of_experts("w", torch.ones(2, 5), first=first, num_experts=4)


def test_layers_of_other_sizes_do_not_add_up() -> None:
    with pytest.raises(SecateurError, match="weights of 2 and of 3 experts"):
        WeightStats.of_experts("w", torch.ones(2, 5)) + WeightStats.of_experts("w", torch.ones(3, 5))
