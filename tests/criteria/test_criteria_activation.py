"""The criteria on data give the numbers worked out by hand for a layer of three tokens and three experts."""

from __future__ import annotations

import dataclasses
import doctest

import pytest
import torch

from secateur.criteria import CRITERIA, Degrees
from secateur.criteria.score import score_layers
from secateur.stats import DEFAULT_SUMS, LayerStats, RouterStats
from support.toy_layer import RAW_GATES, TOY, of_toy, random_layer, scores_of

ON_DATA = [name for name, criterion in CRITERIA.items() if criterion.needs_data]
# criterion -> scores with gates that are not renormalised, and the order in which the experts go, counted from 1
GOLDEN_RAW = {
    "soft_frequency": ([1.3, 1.0, 0.4], [3, 2, 1]),
    "weighted_ean": ([4.4, 1.9, 4], [2, 3, 1]),
    "reap": ([2.2, 1.9 / 3, 4], [2, 1, 3]),
}


@pytest.mark.parametrize("name", ON_DATA)
def test_the_example_of_every_criterion_is_true(name: str) -> None:
    function = CRITERIA[name].function
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={name: function, "of_toy": of_toy})
    assert any(f"of_toy({name})" in one.source for one in example.examples), f"{name} has no example of its scores"
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("name", GOLDEN_RAW)
def test_scores_with_raw_gates_are_those_worked_out_by_hand(name: str) -> None:
    scores, order = GOLDEN_RAW[name]
    found = scores_of(name, dataclasses.replace(TOY, gates=RAW_GATES).stats())
    assert found == pytest.approx(scores, rel=1e-12)
    assert [1 + expert for expert in sorted(range(3), key=found.__getitem__)] == order


def test_the_sums_by_default_are_those_written_out_from_their_definitions() -> None:
    layer = random_layer(0)
    expected: dict[str, list[float]] = {name: [0.0] * 6 for name in DEFAULT_SUMS}
    for token, row in enumerate(layer.gates.tolist()):
        for expert, gate in enumerate(row):
            if gate:
                output = layer.outputs[expert][token].tolist()
                norm = sum(entry * entry for entry in output) ** 0.5
                expected["weight_sum"][expert] += gate
                expected["norm_sum"][expert] += norm
                expected["norm_square_sum"][expert] += norm**2
                expected["weighted_norm_sum"][expert] += gate * norm
                expected["max_activation"][expert] = max(expected["max_activation"][expert], *map(abs, output))
    sums = layer.stats().sums
    for name, values in expected.items():
        assert sums[name].tolist() == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("name", ON_DATA)
def test_merged_windows_score_like_one_window_in_any_order_of_tokens(name: str) -> None:
    layer = random_layer(0)
    whole = scores_of(name, layer.stats())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = [layer.of_tokens(part).stats() for part in order.split([3, 20, 17])]
    assert scores_of(name, parts[0] + parts[1] + parts[2]) == pytest.approx(whole, rel=1e-12)
    assert scores_of(name, parts[2] + parts[0] + parts[1]) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", ON_DATA)
def test_scores_scale_as_the_table_says(name: str) -> None:
    layer = random_layer(2)
    scores = scores_of(name, layer.stats())
    degrees = CRITERIA[name].degrees
    assert isinstance(degrees, Degrees)
    factors = {"outputs": 3.0, "gates": 2.5, "inputs": 0.7, "neurons": 1.1}
    scaled = {part: layer.scaled(part, factor).stats() for part, factor in factors.items()}
    scaled |= {"tokens": layer.stats() + layer.stats()}
    factors |= {"tokens": 2.0}
    assert scaled.keys() == dataclasses.asdict(degrees).keys()
    for part, degree in dataclasses.asdict(degrees).items():
        expected = [factors[part] ** degree * score for score in scores]
        assert scores_of(name, scaled[part]) == pytest.approx(expected, rel=1e-12), part


@pytest.mark.parametrize("name", ON_DATA)
def test_an_expert_that_no_token_reached_scores_0(name: str) -> None:
    scores = scores_of(name, random_layer(3).stats())
    assert scores[-1] == 0
    assert min(scores[:-1]) > 0


@pytest.mark.parametrize("name", ON_DATA)
def test_scoring_leaves_the_statistics_alone(name: str) -> None:
    layer = random_layer(4).stats()
    before = LayerStats(num_tokens=layer.num_tokens, token_count=layer.token_count, **layer.sums)
    score_layers(name, {0: 6}, stats=RouterStats(layers={0: layer}))[0].zero_()
    assert layer == before
