"""The criteria on data give the numbers worked out by hand for a layer of three tokens and three experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.criteria import CRITERIA
from secateur.criteria.score import score_layers
from secateur.stats import LayerStats, RouterStats

# Output of expert e on token t: OUTPUTS[e][t]; the gates, renormalised; 0 where the token is not routed there.
OUTPUTS = torch.tensor(
    [
        [[3, 4], [0, 1], [0, 2]],
        [[1, 0], [0, 2], [-3, 0]],
        [[7, 0], [8, 6], [0, 1]],
    ],
    dtype=torch.float64,
)
GATES = torch.tensor([[2 / 3, 1 / 3, 0], [0, 5 / 9, 4 / 9], [7 / 9, 2 / 9, 0]], dtype=torch.float64)
RAW_GATES = torch.tensor([[0.6, 0.3, 0], [0, 0.5, 0.4], [0.7, 0.2, 0]], dtype=torch.float64)

# criterion -> scores of the experts, and the order in which they go, counted from 1
GOLDEN = {
    "frequency": ([2, 3, 1], [3, 1, 2]),
    "soft_frequency": ([13 / 9, 10 / 9, 4 / 9], [3, 2, 1]),
    "ean": ([7, 6, 10], [2, 1, 3]),
    "man": ([3.5, 2, 10], [2, 1, 3]),
    "msan": ([14.5, 14 / 3, 100], [2, 1, 3]),
    "weighted_ean": ([44 / 9, 19 / 9, 40 / 9], [2, 3, 1]),
    "reap": ([22 / 9, 19 / 27, 40 / 9], [2, 1, 3]),
}
GOLDEN_RAW = {
    "soft_frequency": ([1.3, 1.0, 0.4], [3, 2, 1]),
    "weighted_ean": ([4.4, 1.9, 4], [2, 3, 1]),
    "reap": ([2.2, 1.9 / 3, 4], [2, 1, 3]),
}


def sums_of(gates: Tensor, outputs: Tensor) -> LayerStats:
    """gates (T, E), outputs (E, T, D); sums written out from their definitions."""
    num_experts = len(outputs)
    rows: dict[str, list[float]] = {
        name: [0.0] * num_experts
        for name in ("weight_sum", "norm_sum", "norm_square_sum", "weighted_norm_sum", "max_activation")
    }
    count = [0] * num_experts
    for token, row in enumerate(gates.tolist()):
        for expert, gate in enumerate(row):
            if gate:
                output = outputs[expert][token].tolist()
                norm = sum(entry * entry for entry in output) ** 0.5
                count[expert] += 1
                rows["weight_sum"][expert] += gate
                rows["norm_sum"][expert] += norm
                rows["norm_square_sum"][expert] += norm**2
                rows["weighted_norm_sum"][expert] += gate * norm
                rows["max_activation"][expert] = max(rows["max_activation"][expert], *map(abs, output))
    sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    return LayerStats(num_tokens=len(gates), token_count=torch.tensor(count), **sums)


def scores_of(name: str, layer: LayerStats) -> list[float]:
    found = score_layers(name, {0: layer.num_experts}, stats=RouterStats(layers={0: layer}))[0]
    assert found.dtype == torch.float64
    return [float(score) for score in found]


@pytest.mark.parametrize("gates", ["renormalised", "raw"])
def test_scores_are_those_worked_out_by_hand(gates: str) -> None:
    table = GOLDEN if gates == "renormalised" else GOLDEN_RAW
    layer = sums_of(GATES if gates == "renormalised" else RAW_GATES, OUTPUTS)
    for name, (scores, order) in table.items():
        found = scores_of(name, layer)
        assert found == pytest.approx(scores, rel=1e-12), name
        assert [1 + expert for expert in sorted(range(3), key=found.__getitem__)] == order, name


def test_every_criterion_on_data_has_golden_numbers() -> None:
    assert {name for name, criterion in CRITERIA.items() if criterion.needs_data} == set(GOLDEN)


def test_the_sums_of_the_example_are_those_worked_out_by_hand() -> None:
    sums = sums_of(GATES, OUTPUTS).sums
    assert sums["norm_square_sum"].tolist() == pytest.approx([29, 14, 100])
    assert sums["max_activation"].tolist() == [4, 3, 8]  # absolute: the signed maximum of expert 2 is 2
    assert float(sums["weight_sum"].sum()) == pytest.approx(3)


def random_layer(seed: int, num_tokens: int = 40) -> tuple[Tensor, Tensor]:
    """(T, E) gates of a top-2 router over 6 experts, the last never chosen, and outputs (E, T, D)."""
    rng = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(num_tokens, 6, generator=rng, dtype=torch.float64)
    probabilities[:, -1] = 0
    top = probabilities.topk(2)
    gates = torch.zeros_like(probabilities).scatter_(1, top.indices, top.values / top.values.sum(1, keepdim=True))
    return gates, torch.randn(6, num_tokens, 5, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("name", GOLDEN)
def test_merged_windows_score_like_one_window_in_any_order_of_tokens(name: str) -> None:
    gates, outputs = random_layer(0)
    whole = scores_of(name, sums_of(gates, outputs))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = [sums_of(gates[part], outputs[:, part]) for part in order.split([3, 20, 17])]
    assert scores_of(name, parts[0] + parts[1] + parts[2]) == pytest.approx(whole, rel=1e-12)
    assert scores_of(name, parts[2] + parts[0] + parts[1]) == pytest.approx(whole, rel=1e-12)


# what a score is multiplied with when (all outputs, all gates, the number of times each token is seen) are by c
DEGREES = {
    "frequency": (0, 0, 1),
    "soft_frequency": (0, 1, 1),
    "ean": (1, 0, 1),
    "man": (1, 0, 0),
    "msan": (2, 0, 0),
    "weighted_ean": (1, 1, 1),
    "reap": (1, 1, 0),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_scores_scale_with_outputs_gates_and_tokens(name: str) -> None:
    gates, outputs = random_layer(2)
    scores = scores_of(name, sums_of(gates, outputs))
    by_outputs, by_gates, by_tokens = DEGREES[name]
    layers = {
        3.0**by_outputs: sums_of(gates, outputs * 3),
        2.5**by_gates: sums_of(gates * 2.5, outputs),
        2.0**by_tokens: sums_of(gates, outputs) + sums_of(gates, outputs),
    }
    for factor, layer in layers.items():
        assert scores_of(name, layer) == pytest.approx([factor * score for score in scores], rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_an_expert_that_no_token_reached_scores_0(name: str) -> None:
    scores = scores_of(name, sums_of(*random_layer(3)))
    assert scores[-1] == 0
    assert min(scores[:-1]) > 0


@pytest.mark.parametrize("name", GOLDEN)
def test_scoring_leaves_the_statistics_alone(name: str) -> None:
    layer = sums_of(*random_layer(4))
    before = layer.to_json()
    score_layers(name, {0: 6}, stats=RouterStats(layers={0: layer}))[0].zero_()
    assert layer.to_json() == before
