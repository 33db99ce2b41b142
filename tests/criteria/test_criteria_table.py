"""Every line of the table works, is documented, and says what it misses; super-experts are outliers."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from secateur.criteria import CRITERIA, Criterion, activation
from secateur.criteria.router_change import RouterChange
from secateur.criteria.score import never_routed, score_layers
from secateur.criteria.super_experts import super_experts
from secateur.criteria.weights import WeightStats
from secateur.errors import SecateurError
from secateur.stats import SUMS, LayerStats, RouterStats
from support.made_up_sums import sums_like

ON_DATA = [name for name, criterion in CRITERIA.items() if criterion.needs_data]
ON_WEIGHTS = [name for name, criterion in CRITERIA.items() if str(criterion.needs).endswith("weights")]
ON_CHANGE = [name for name, criterion in CRITERIA.items() if criterion.needs == "router change"]


def stats_of(counts: list[int], *, without: tuple[str, ...] = (), layers: tuple[int, ...] = (0,)) -> RouterStats:
    count = torch.tensor(counts)
    sums = sums_like(count, [name for name in SUMS if name not in without])
    return RouterStats(layers={layer: LayerStats(num_tokens=9, token_count=count, **sums) for layer in layers})


def weights_of(num_experts: int = 3) -> WeightStats:
    tensor = torch.arange(1.0, 1 + 2 * num_experts).reshape(num_experts, 2)
    return WeightStats.of_experts("w", tensor) + WeightStats.of_router("r", tensor)


def change_of(num_experts: int = 3) -> RouterChange:
    before = torch.arange(1.0, 1 + 2 * num_experts).reshape(num_experts, 2)
    return RouterChange.of_rows("r", before, before.flip(1) * 1.5)


def read_for(name: str) -> WeightStats | RouterChange:
    return change_of() if name in ON_CHANGE else weights_of()


def score(name: str, **changes: object) -> object:
    given = {"stats": stats_of([4, 5, 0]), "weights": {0: read_for(name)}} | changes
    return score_layers(name, {0: 3}, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_expert_with_a_finite_number(name: str) -> None:
    scores = score_layers(name, {0: 3}, stats=stats_of([4, 5, 0]), weights={0: read_for(name)}, seed=1)
    assert scores[0].shape == (3,)
    assert scores[0].dtype == torch.float64
    assert bool(torch.isfinite(scores[0]).all())


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_documented_with_its_source(name: str) -> None:
    criterion = CRITERIA[name]
    assert criterion.name == name == criterion.function.__name__
    assert inspect.getdoc(criterion.function)
    assert (criterion.degrees is not None) == criterion.needs_data
    assert len(criterion.help) < 60
    assert "\n" not in criterion.help
    paper = re.match(r"\d{4}\.\d{5}", criterion.source)
    if paper:
        assert f"arXiv {paper[0]}" in (inspect.getdoc(criterion.function) or "")


@pytest.mark.parametrize("name", ON_DATA)
def test_a_missing_field_is_named_with_the_criterion(name: str) -> None:
    needs = CRITERIA[name].needs
    for field in (one for one in needs if one != "token_count"):  # which statistics always have
        with pytest.raises(SecateurError, match=f"'{name}' needs {field}, but the statistics have only token_co"):
            score(name, stats=stats_of([4, 5, 0], without=(field,)))
    others = tuple(other for other in SUMS if other not in needs)
    assert score(name, stats=stats_of([4, 5, 0], without=others)), "a field was asked for that is not needed"


def test_a_criterion_may_need_two_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Criterion(
        name="two", home="activation", needs=("weight_sum", "norm_sum"), source="control", help="a sum of two sums"
    )
    monkeypatch.setattr(activation, "two", lambda layer: layer.weight_sum + layer.norm_sum, raising=False)
    monkeypatch.setitem(CRITERIA, "two", two)
    assert score_layers("two", {0: 3}, stats=stats_of([4, 5, 0]))[0].tolist() == [8, 10, 0]
    test_a_missing_field_is_named_with_the_criterion("two")
    with pytest.raises(SecateurError, match="criterion 'two' needs weight_sum, norm_sum, but the statistics have"):
        score_layers("two", {0: 3}, stats=stats_of([4, 5, 0], without=two.needs))


@pytest.mark.parametrize("name", ON_DATA)
def test_statistics_are_needed_have_tokens_and_fit(name: str) -> None:
    with pytest.raises(SecateurError, match=f"criterion '{name}' needs .*found none"):
        score(name, stats=None)
    with pytest.raises(SecateurError, match=f"criterion '{name}', layer 0: token_count is 0 for every expert"):
        score(name, stats=stats_of([0, 0, 0]))


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_weights_are_needed_and_must_have_been_read(name: str) -> None:
    with pytest.raises(SecateurError, match=f"criterion '{name}' needs {CRITERIA[name].needs}, found none"):
        score(name, weights=None)
    read = WeightStats.of_router if CRITERIA[name].needs == "expert weights" else WeightStats.of_experts
    with pytest.raises(SecateurError, match=f"criterion '{name}', layer 0: {CRITERIA[name].needs} are missing"):
        score(name, weights={0: read("w", torch.ones(3, 2))})


@pytest.mark.parametrize("name", [*ON_WEIGHTS, *ON_CHANGE])
def test_what_another_criterion_reads_does_not_do(name: str) -> None:
    other = weights_of() if name in ON_CHANGE else change_of()
    with pytest.raises(
        SecateurError, match=f"criterion '{name}' needs {CRITERIA[name].needs}, found {type(other).__name__}"
    ):
        score(name, weights={0: other})
    with pytest.raises(SecateurError, match=f"criterion '{name}' needs {CRITERIA[name].needs}, found none"):
        score(name, weights=None)


def test_weights_of_one_expert_that_were_not_read_are_noticed() -> None:
    partly = WeightStats.of_experts("w", torch.ones(2, 2), num_experts=3)
    with pytest.raises(SecateurError, match="expert weights are missing"):
        score("weight_norm", weights={0: partly})


@pytest.mark.parametrize("name", CRITERIA)
def test_statistics_and_weights_of_another_model_are_refused_even_where_they_are_not_needed(name: str) -> None:
    wrong = [
        {"stats": stats_of([4, 5, 0], layers=(0, 2))},
        {"stats": stats_of([4, 5])},
        {"weights": {1: weights_of()}},
        {"weights": {0: weights_of(4)}},
    ]
    for changes in wrong:
        with pytest.raises(SecateurError, match=f"criterion '{name}': (statistics|weights) do not fit the model"):
            score(name, **changes)


def test_an_unknown_criterion_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SecateurError, match=r"criterion is 'raep', expected one of frequency, .*reap.*random"):
        score_layers("raep", {0: 3})


def test_a_score_that_is_not_finite_is_an_error() -> None:
    huge = LayerStats(
        num_tokens=1, token_count=torch.tensor([1, 1]), norm_sum=torch.tensor([1e308, 1.0], dtype=torch.float64)
    )
    assert score_layers("ean", {0: 2}, stats=RouterStats(layers={0: huge}))
    overflowing = WeightStats.of_experts("w", torch.ones(2, 2)) + WeightStats(
        num_weights=torch.zeros(2, dtype=torch.int64),
        absolute_sum=torch.zeros(2, dtype=torch.float64),
        square_sum=torch.tensor([0.0, float("inf")], dtype=torch.float64),
        router_square_sum=torch.zeros(2, dtype=torch.float64),
    )
    with pytest.raises(SecateurError, match=r"criterion 'weight_norm', layer 0: the scores of experts \[1\] are not"):
        score_layers("weight_norm", {0: 2}, weights={0: overflowing})


def test_never_routed_experts_are_listed_by_layer() -> None:
    stats = RouterStats.from_loads({0: [0, 2, 0], 1: [1, 1, 1], 5: [3, 0, 0]}, 3)
    assert never_routed(stats) == {0: (0, 2), 5: (1, 2)}


def maxima(*layers: list[float]) -> RouterStats:
    """Statistics with these maxima, in layers 2, 4, 6, ..."""
    return RouterStats(
        layers={
            2 + 2 * number: LayerStats(
                num_tokens=1,
                token_count=torch.ones(len(values), dtype=torch.int64),
                max_activation=torch.tensor(values, dtype=torch.float64),
            )
            for number, values in enumerate(layers)
        }
    )


def test_super_experts_are_above_the_quantile_and_a_tenth_of_the_largest_in_the_first_layers() -> None:
    quiet = [1.0] * 100
    layers = [list(quiet) for _ in range(8)]
    layers[0][7] = 1000.0
    layers[5][3] = 101.0
    layers[4][2] = 100.0  # a tenth of the largest is not above it
    layers[6][1] = 900.0  # the last two of eight layers are not looked at
    assert super_experts(maxima(*layers)) == {2: (7,), 12: (3,)}


def test_the_quantile_decides_where_many_are_large() -> None:
    # The 99.5 % quantile of 200 experts is 199.005: the largest is above it, the second largest (199) is not.
    values = [float(value) for value in range(1, 201)]
    assert super_experts(maxima(values[100:], values[:100])) == {2: (99,)}


def test_a_part_of_a_layer_is_not_looked_at_for_super_experts() -> None:
    layers = [[1.0] * 100 for _ in range(5)]  # three quarters of them are 3.75 layers
    layers[2][7] = layers[3][3] = 1000.0
    assert super_experts(maxima(*layers)) == {6: (7,)}


def test_equal_maxima_are_no_outliers() -> None:
    assert super_experts(maxima([2.0] * 4, [2.0] * 4)) == {}


def test_super_experts_need_maxima() -> None:
    with pytest.raises(SecateurError, match="max_activation, which the statistics do not have"):
        super_experts(RouterStats.from_loads({0: [1, 2]}, 3))
