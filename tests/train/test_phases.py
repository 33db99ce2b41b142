"""The detector says "stable" exactly when a choice made half as many tokens ago would cost little now."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from secateur.decide.laep_rule import removal_order
from secateur.errors import SecateurError
from secateur.train.load_history import MOST, LoadHistory
from secateur.train.phases import (
    LEAST_AHEAD,
    UNKNOWN_AHEAD,
    PhaseConstants,
    PhaseReport,
    dispersion,
    doublings_ahead,
    in_words,
    mean_regret,
    moment,
    phase_of,
    recent_loads,
    recent_tokens,
    regret,
    sampling_regret,
    total_variation,
)

TOKENS = 1000
EARLY = PhaseConstants(max_regret=0.01, min_windows=5)
THEN = [5, 40, 10, 300, 20, 80, 35, 510]
NOW = [100, 10, 50, 300, 20, 80, 35, 405]
SKEWED = [0.30, 0.25, 0.15, 0.10, 0.08, 0.06, 0.04, 0.02]


def history_of(windows: Iterable[list[int]], tokens: int = TOKENS) -> LoadHistory:
    history = LoadHistory()
    for loads in windows:
        history.add({0: loads}, tokens)
    return history


def found_in(history: LoadHistory, constants: PhaseConstants = EARLY, **more: Any) -> PhaseReport:
    """The phase where the tokens will double once."""
    return phase_of(history, constants, **{"ahead": 1.0, **more})


def drawn(rng: random.Random, shares: list[float], tokens: int) -> list[int]:
    loads = [0] * len(shares)
    for expert in rng.choices(range(len(shares)), shares, k=tokens):
        loads[expert] += 1
    return loads


def test_regret_golden_values() -> None:
    assert regret(THEN, NOW) == (100 + 50 - 10 - 20) / 1000
    assert regret(NOW, THEN) == (40 + 20 - 5 - 10) / 1000
    assert regret(NOW, NOW) == 0
    assert regret([3, 3, 3, 3], [1, 2, 3, 4]) == 0.3  # of equal loads the higher id goes first
    assert regret([2, 1], [9, 1]) == 0.0  # a quarter is at least one expert


def test_the_experts_that_are_chosen_are_those_that_the_rule_removes_first() -> None:
    rng = random.Random(1)
    for _ in range(200):
        then, now = ([rng.randrange(6) + 1 for _ in range(11)] for _ in range(2))  # with many ties
        chosen, idlest = (sum(now[expert] for expert in removal_order(loads)[:2]) for loads in (then, now))
        assert regret(then, now) == (chosen - idlest) / sum(now)


def test_noise_is_what_samples_of_the_same_loads_have_of_each_other() -> None:
    """Drawn anew from fixed shares: the mean regret of one moment by another is within a third of what is estimated."""
    rng = random.Random(2)
    shares = [0.25, 0.2, 0.15, 0.1, 0.085, 0.08, 0.07, 0.065]
    for tokens in (100, 400, 1600):
        loads = [drawn(rng, shares, tokens) for _ in range(200)]
        found = sum(regret(a, b) for a, b in itertools.pairwise(loads)) / 199
        estimated = sum(sampling_regret(one, 1.0) for one in loads[:40]) / 40
        assert estimated == pytest.approx(found, rel=1 / 3)


def test_loads_that_vary_more_than_independent_tokens_have_a_larger_spread() -> None:
    rng = random.Random(3)
    alone = [drawn(rng, SKEWED, 1000) for _ in range(24)]
    in_fours = [[4 * load for load in drawn(rng, SKEWED, 250)] for _ in range(24)]
    assert dispersion(history_of(alone)) == pytest.approx(1.0, abs=0.7)
    assert dispersion(history_of(in_fours)) == pytest.approx(4.0, rel=0.5)


def test_regret_is_of_shares_and_of_no_numbering() -> None:
    rng = random.Random(0)
    for _ in range(100):
        then, now = (rng.sample(range(1, 1000), 9) for _ in range(2))
        value = regret(then, now)
        assert 0 <= value <= 1
        assert regret([3 * load for load in then], [7 * load for load in now]) == pytest.approx(value)
        order = rng.sample(range(9), 9)
        assert regret([then[old] for old in order], [now[old] for old in order]) == value


def test_total_variation_golden_values() -> None:
    assert total_variation([1, 2], [2, 4]) == 0.0
    assert total_variation([1, 0], [0, 9]) == 1.0
    assert total_variation([10, 20, 30, 40], [40, 30, 20, 10]) == 0.4
    for other in ([1], [0, 0]):
        with pytest.raises(SecateurError, match="cannot be compared"):
            total_variation([1, 2], other)


def test_the_mean_is_over_the_layers() -> None:
    assert mean_regret({0: THEN, 3: NOW}, {0: NOW, 3: NOW}) == 0.06


def test_a_moment_is_an_eighth_of_the_tokens_and_at_least_three_windows() -> None:
    numbered = [[number, 1] for number in range(1, 41)]  # so that a sum tells which windows it is of
    for windows, last, first in [(1, 1, 1), (2, 2, 1), (5, 5, 3), (24, 24, 22), (40, 40, 36)]:
        history = history_of(numbered[:windows])
        assert recent_loads(history)[0] == [sum(range(first, last + 1)), last + 1 - first]
        assert recent_tokens(history) == TOKENS * (last + 1 - first)
    halfway = moment(history_of(numbered), 20 * TOKENS)[0]
    assert halfway == [16 + 17 + 18 + 19 + 20, 5]


def test_the_regret_is_of_all_choices_since_a_fifth_of_the_tokens() -> None:
    """Loads change once, after window 10. At window 20, 16 choices count, those made at the windows 4 to 19.

    Seven are of the loads of before: 0.12 each. Of the two that are of both, that at 11 takes the experts 4 and 2, 0.04
    more than the idlest carry, and that at 12 the idlest.
    """
    windows = [*[THEN] * 10, *[NOW] * 140]
    report = found_in(history_of(windows[:20]), EARLY)
    assert report.regret == pytest.approx((7 * 0.12 + 0.04) / 16)
    assert found_in(history_of(windows), EARLY).regret == 0.0
    found = [found_in(history_of(windows[:number]), EARLY).regret for number in range(16, 51)]
    assert found == sorted(found, reverse=True)  # type: ignore[type-var]


def test_what_a_choice_will_cost_grows_with_the_doublings_to_come() -> None:
    history = history_of([*[THEN] * 10, *[NOW] * 10])
    once = phase_of(history, EARLY, ahead=1.0).regret
    assert once is not None
    assert phase_of(history, EARLY, ahead=3.0).regret == pytest.approx(3 * once)
    assert phase_of(history, EARLY).regret == pytest.approx(UNKNOWN_AHEAD * once)
    limit = replace(EARLY, max_regret=1.5 * once)
    assert [phase_of(history, limit, ahead=ahead).phase for ahead in (1.4, 1.6)] == ["stable", "moving"]


def test_doublings_to_come_are_those_of_the_tokens_so_far() -> None:
    history = history_of([NOW] * 10)
    assert doublings_ahead(history, 30 * TOKENS) == 2.0
    assert doublings_ahead(history, 10 * TOKENS) == 1.0
    assert doublings_ahead(history, 5 * TOKENS) == doublings_ahead(history, 0) == LEAST_AHEAD
    assert doublings_ahead(history, None) == UNKNOWN_AHEAD


def test_there_is_nothing_to_look_back_at_in_the_first_windows() -> None:
    phases = [found_in(history_of([THEN] * number), EARLY) for number in range(1, EARLY.min_windows + 1)]
    assert {report.phase for report in phases[:-1]} == {"begin"}
    assert {report.regret for report in phases[:-1]} == {None}
    assert phases[-1].phase == "unlearned"


def test_neither_a_long_window_nor_many_tokens_change_what_is_found() -> None:
    rng = random.Random(0)
    short = [[1 + int(100 * rng.random() * (1 + window / 48)) for _ in range(8)] for window in range(48)]
    large = [[1000 * load for load in window] for window in short]
    first = found_in(history_of(short), EARLY)
    found = found_in(history_of(large, 1000 * TOKENS), EARLY)
    assert (found.regret, found.change) == (pytest.approx(first.regret), pytest.approx(first.change))
    halved = [half for window in short for half in ([load // 2 for load in window], [-(-load // 2) for load in window])]
    found = found_in(history_of(halved, TOKENS // 2), EARLY)
    assert found.regret == pytest.approx(first.regret, rel=0.1)


def test_loads_that_stay_where_they_began_are_unlearned_unless_the_model_had_been_trained() -> None:
    still = history_of([NOW] * 30)
    assert found_in(still, EARLY).phase == "unlearned"
    assert found_in(still, EARLY, learned=True).phase == "stable"
    assert found_in(still, replace(EARLY, min_change=0)).phase == "stable"
    left = history_of([THEN, *[NOW] * 30])
    assert found_in(left, EARLY).change == pytest.approx(total_variation(THEN, NOW))
    assert found_in(left, EARLY).phase == "stable"
    assert found_in(left, replace(EARLY, min_change=0.5)).phase == "unlearned"


def test_nothing_is_stable_while_the_learning_rate_rises() -> None:
    left = history_of([THEN, *[NOW] * 30])
    assert found_in(left, EARLY, rises=True).phase == "warm-up"
    assert found_in(history_of([NOW] * 2), EARLY, rises=True).phase == "begin"


def test_loads_that_keep_moving_are_moving() -> None:
    turned = [
        [round(1000 * (1.1 + math.sin(expert + math.log2(window)))) for expert in range(8)] for window in range(1, 61)
    ]
    phases = {found_in(history_of(turned[:number]), EARLY).phase for number in range(EARLY.min_windows, 61)}
    assert phases == {"moving"}


@pytest.mark.parametrize("seed", range(4))
def test_sampling_noise_is_told_from_movement_and_says_how_many_tokens_are_missing(seed: int) -> None:
    """Fixed shares: few tokens say "unknown", with the tokens that a moment needs; with as many it is stable."""
    rng = random.Random(seed)
    close = [0.25, 0.2, 0.15, 0.1, 0.085, 0.08, 0.07, 0.065]
    few = history_of([drawn(rng, close[::-1], 40), *(drawn(rng, close, 40) for _ in range(15))], 40)
    report = found_in(few, EARLY)
    assert report.phase in ("unknown", "moving")
    assert report.noise is not None
    assert report.noise > 0.005
    assert report.tokens_needed is not None
    assert report.tokens_needed > recent_tokens(few)
    enough = 10_000
    many = history_of([drawn(rng, close[::-1], enough), *(drawn(rng, close, enough) for _ in range(15))], enough)
    report = found_in(many, EARLY)
    assert (report.phase, report.tokens_needed) == ("stable", None)
    assert report.noise is not None
    assert report.noise <= 0.005


def test_a_regret_far_above_its_noise_is_no_noise() -> None:
    rng = random.Random(0)
    few = [drawn(rng, SKEWED[::-1], 40) for _ in range(8)] + [drawn(rng, SKEWED, 40) for _ in range(7)]
    report = found_in(history_of(few, 40), replace(EARLY, max_noise=0.001))
    assert report.noise is not None
    assert report.noise > 0.001
    assert report.phase == "moving"


def test_a_long_run_is_found_stable_as_a_short_one_is() -> None:
    for number in (30, MOST + 7, 5 * MOST):
        moved = history_of([*[THEN] * (number // 10), *[NOW] * number])
        assert found_in(moved, EARLY).phase == "stable"
        just = history_of([*[THEN] * number, *[NOW] * (number // 2)])
        assert found_in(just, EARLY).phase == "moving"


@pytest.mark.parametrize(
    ("report", "words", "limit"),
    [
        (PhaseReport(phase="begin"), "begin", ""),
        (PhaseReport(phase="warm-up", regret=0.1, noise=0.1, change=0.1), "warm-up", ""),
        (
            PhaseReport(phase="moving", regret=0.2352, noise=0.1, change=0.1),
            "moving, regret 24%",
            " (max_regret 1.00%)",
        ),
        (
            PhaseReport(phase="unknown", regret=0.2, noise=0.0123, change=0.1),
            "unknown, noise 1.23%",
            " (max_noise 0.50%)",
        ),
        (PhaseReport(phase="moving", regret=1.0, noise=0.1, change=0.1), "moving, regret 100%", " (max_regret 1.00%)"),
        (
            PhaseReport(phase="unlearned", regret=0, noise=0, change=0.04),
            "unlearned, change 4.00%",
            " (min_change 10%)",
        ),
        (
            PhaseReport(phase="stable", regret=0.0031, noise=0, change=0.4),
            "stable, regret 0.31%",
            " (max_regret 1.00%)",
        ),
    ],
)
def test_phases_in_words(report: PhaseReport, words: str, limit: str) -> None:
    assert in_words(report) == words
    assert in_words(report, EARLY) == words + limit
    assert report.stable == (report.phase == "stable")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_regret": 1.1}, "max_regret is 1.1"),
        ({"max_noise": -0.1}, "max_noise is -0.1"),
        ({"max_noise": math.nan}, "max_noise is nan"),
        ({"min_change": "much"}, "min_change is 'much'"),
        ({"min_change": True}, "min_change is True"),
        ({"min_windows": 1}, "min_windows is 1, expected a whole number of at least 2"),
        ({"min_windows": 16.0}, r"min_windows is 16\.0"),
    ],
)
def test_constants_out_of_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        PhaseConstants(**arguments)
