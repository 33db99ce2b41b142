"""The LAEP rule removes exactly what its two inequalities say."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import pytest

from secateur.decide.laep_rule import implied_thresholds, laep_removable
from secateur.errors import SecateurError

SPEC_LOADS = [5, 40, 10, 300, 20, 80, 35, 510]
SPEC_ROWS = [
    (0.2, 0.1, [0, 2, 4]),
    (0.4, 0.1, [0, 2, 4, 6]),
    (math.inf, 0.05, [0, 2, 4]),
    (math.inf, 0.1, [0, 2, 4, 6]),
    (math.inf, 0.2, [0, 2, 4, 6, 1, 5]),
    (0.4, 1, [0, 2, 4, 6, 1]),
]


def random_loads(rng: random.Random) -> list[int]:
    loads = [rng.choice([0, 1, rng.randrange(10), rng.randrange(1000)]) for _ in range(rng.randint(1, 12))]
    return loads if sum(loads) else [1, *loads[1:]]


@pytest.mark.parametrize(("alpha", "beta", "removed"), SPEC_ROWS)
def test_worked_example_in_removal_order(alpha: float, beta: float, removed: list[int]) -> None:
    assert laep_removable(SPEC_LOADS, alpha=alpha, beta=beta) == removed


def test_both_inequalities_decide_each_expert() -> None:
    rng = random.Random(0)
    for _ in range(500):
        loads, percent_a, percent_b = random_loads(rng), rng.randint(1, 250), rng.randint(1, 99)
        removed = laep_removable(loads, alpha=percent_a / 100, beta=percent_b / 100)
        for expert, load in enumerate(loads):
            before_or_equal = [n for i, n in enumerate(loads) if n < load or (n == load and i >= expert)]
            individual = 100 * load * len(loads) <= percent_a * sum(loads)
            cumulative = 100 * sum(before_or_equal) < percent_b * sum(loads)
            assert (expert in removed) == (individual and cumulative), (loads, percent_a, percent_b, expert)
        assert removed == sorted(removed, key=lambda expert: (loads[expert], -expert))


def test_removal_grows_with_alpha_and_with_beta() -> None:
    rng = random.Random(1)
    for _ in range(200):
        loads = random_loads(rng)
        alphas = [*sorted(rng.uniform(1e-3, 3) for _ in range(3)), math.inf]
        betas = [*sorted(rng.uniform(1e-3, 1) for _ in range(3)), 1.0]
        for beta in betas:
            runs = [laep_removable(loads, alpha=alpha, beta=beta) for alpha in alphas]
            assert all(more[: len(less)] == less for less, more in itertools.pairwise(runs))
        for alpha in alphas:
            runs = [laep_removable(loads, alpha=alpha, beta=beta) for beta in betas]
            assert all(more[: len(less)] == less for less, more in itertools.pairwise(runs))


def test_lower_id_of_equal_loads_is_kept() -> None:
    assert laep_removable([10, 10, 10, 70], alpha=math.inf, beta=0.25) == [2, 1]


def test_equality_counts_as_typed_not_as_binary_floats() -> None:
    assert 0.07 * 100 > 7, "a float comparison would remove the expert with load 7"
    assert laep_removable([93, 7], alpha=math.inf, beta=0.07) == []
    assert 0.58 * 100 < 58, "a float comparison would keep the expert with load 29 = 0.58 * 50"
    assert laep_removable([29, 71], alpha=0.58, beta=1) == [0]


def test_experts_without_a_token_go_at_any_threshold() -> None:
    assert laep_removable([0, 5, 0], alpha=1e-300, beta=1e-300) == [2, 0]


def test_both_constraints_off_leave_the_decision_to_the_floors() -> None:
    assert laep_removable([3, 1, 2], alpha=math.inf, beta=1) == [1, 2, 0]
    assert laep_removable([4, 4], alpha=1, beta=1) == [1, 0]


def test_implied_thresholds_give_the_removal_and_nothing_smaller_does() -> None:
    rng = random.Random(2)
    for _ in range(300):
        loads = random_loads(rng)
        order = laep_removable(loads, alpha=math.inf, beta=1)
        for count in range(1, len(loads) + 1):
            alpha, beta = implied_thresholds(loads, order[:count])
            assert laep_removable(loads, alpha=alpha, beta=1)[:count] == order[:count]
            assert laep_removable(loads, alpha=math.inf, beta=beta)[:count] == order[:count]
            if loads[order[count - 1]]:
                below = math.nextafter(alpha, 0)
                assert len(laep_removable(loads, alpha=below, beta=1)) < count
                assert len(laep_removable(loads, alpha=math.inf, beta=math.nextafter(beta, 0))) < count
            if count < len(loads) and loads[order[count]] > loads[order[count - 1]]:
                assert laep_removable(loads, alpha=alpha, beta=beta) == order[:count]


def test_implied_thresholds_of_the_worked_example() -> None:
    alpha, beta = implied_thresholds(SPEC_LOADS, [0, 2, 4])
    assert alpha == 20 / 125
    assert beta == math.nextafter(0.035, 1)
    assert Fraction(beta) > Fraction(35, 1000)
    assert implied_thresholds(SPEC_LOADS, []) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0, "beta": 0.1}, "layer 3: alpha is 0.0"),
        ({"alpha": -1, "beta": 0.1}, "layer 3: alpha is -1"),
        ({"alpha": math.nan, "beta": 0.1}, "layer 3: alpha is nan"),
        ({"alpha": 0.2, "beta": 0.0}, "layer 3: beta is 0.0"),
        ({"alpha": 0.2, "beta": 1.01}, "layer 3: beta is 1.01"),
        ({"alpha": 0.2, "beta": math.nan}, "layer 3: beta is nan"),
        ({"alpha": 0.2, "beta": math.inf}, "layer 3: beta is inf"),
        ({"alpha": 0.2, "beta": 0.1, "loads": [0, 0]}, "layer 3: no token was routed to any of its 2 experts"),
        ({"alpha": 0.2, "beta": 0.1, "loads": [4, -1]}, "layer 3: a load is -1"),
    ],
)
def test_bad_input_is_refused_by_layer_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        laep_removable(**{"loads": [1, 2], "name": "layer 3", **arguments})
