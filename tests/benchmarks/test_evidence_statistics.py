"""The statistics of the evidence runs, on data whose answers are known, and what their settings resolve to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from laep_evidence import equal_steps
from laep_statistics import fitted, paired
from laep_tables import resolved
from laep_timing import of_turns


def test_the_paired_test_gives_the_numbers_of_a_textbook() -> None:
    """Student's own data (1908, hours of additional sleep by two drugs): t = 4.0621 with 9 degrees of freedom."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(second, first)
    assert (found.pairs, found.mean) == (10, pytest.approx(1.58))
    assert found.deviation == pytest.approx(1.2300, abs=1e-4)
    assert found.p == pytest.approx(0.00283, abs=1e-5)
    assert (found.low, found.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


def test_the_sign_is_of_the_first_minus_the_second() -> None:
    assert paired([1.0, 2.0], [2.0, 4.0]).mean == -1.5


def test_one_pair_has_no_uncertainty_and_equal_differences_no_test() -> None:
    one, equal = paired([1.0], [0.5]), paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (one.mean, one.deviation, one.low, one.p) == (0.5, None, None, None)
    assert (equal.low, equal.high, equal.p) == (0.5, 0.5, None)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(a, b)


def test_a_line_gets_the_slope_and_range_of_a_textbook() -> None:
    """By hand: slope 6 / 10, squared residuals 2.4 over 3 degrees of freedom, t = 3.1824."""
    fit = fitted([2, 4, 5, 4, 5], [1, 2, 3, 4, 5])
    (slope,) = fit.slopes
    assert (slope.value, fit.intercept) == (pytest.approx(0.6), pytest.approx(2.2))
    reach = 3.18245 * (2.4 / 3 / 10) ** 0.5
    assert (slope.low, slope.high) == (pytest.approx(0.6 - reach, abs=1e-4), pytest.approx(0.6 + reach, abs=1e-4))
    at_5 = 3.18245 * (2.4 / 3 * (1 / 5 + 2**2 / 10)) ** 0.5
    assert fit.at(5) == (pytest.approx(5.2), pytest.approx(5.2 - at_5, abs=1e-4), pytest.approx(5.2 + at_5, abs=1e-4))


def test_a_plane_gets_both_slopes_and_their_ranges() -> None:
    """By hand: on a square of points the two slopes are 2 / 4 and -4 / 4; one degree of freedom, t = 12.706."""
    fit = fitted([1, 3, 0, 0], [-1, 1, -1, 1], [-1, -1, 1, 1])
    assert [slope.value for slope in fit.slopes] == [pytest.approx(0.5), pytest.approx(-1.0)]
    residual = 4 * 0.5**2
    for slope in fit.slopes:
        assert slope.high - slope.value == pytest.approx(12.7062 * (residual / 4) ** 0.5, abs=1e-3)


def test_a_fit_of_too_little_is_refused() -> None:
    for y, *x in (([1, 2], [1, 2]), ([1, 2, 3], [1, 1, 1]), ([1, 2, 3, 4], [1, 2, 3, 4], [2, 4, 6, 8])):
        with pytest.raises(ValueError, match="no uncertainty"):
            fitted(y, *x)


EVENT = {"step": 200, "parameters_before": 1000, "parameters_after": 800, "layers": {}}
EVENT["layers"] = {"0": {"experts_before": 8, "experts_after": 5}, "1": {"experts_before": 8, "experts_after": 6}}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("{0.5}", "100"),
        ("step={1+40} target_params={part 0 of 2}", "step=240 target_params=0.880000"),  # 3 of the 5 experts, 40 each
        ("{part 1 of 2}", "0.909091"),  # 800 / 880, not a millionth less
        ("0.75", "0.75"),
    ],
)
def test_options_that_follow_another_run_are_filled_in(word: str, expected: str) -> None:
    assert resolved(word, EVENT, 400) == expected


def test_a_pruning_after_the_end_is_refused() -> None:
    with pytest.raises(LookupError, match="step 400 of 400"):
        resolved("{2}", EVENT, 400)


def test_equal_time_counts_every_part_of_a_run_with_the_speed_it_had() -> None:
    """By hand: 100 steps of 2 s, 100 of 1 s and 100 of 0.5 s are 350 s, in which the whole model makes 175 steps."""
    run = {"events": [{"step": 100}, {"step": 200}], "steps": 300}
    assert equal_steps(run, [2.0, 1.0, 0.5]) == 175


def test_a_machine_that_slows_down_does_not_change_the_ratio_of_two_models() -> None:
    """By hand: in two turns of three the second takes half as long, and 0.6 in the third."""
    assert of_turns([[1.0, 2.0, 4.0], [0.5, 1.2, 2.0]]) == [2.0, 1.0]
