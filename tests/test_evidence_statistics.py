"""The statistics of the evidence runs, on data whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from laep_statistics import fitted_line, paired


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
    assert (one.mean, one.low, one.p) == (0.5, None, None)
    assert (equal.low, equal.high, equal.p) == (0.5, 0.5, None)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(a, b)


def test_a_line_gets_the_slope_and_range_of_a_textbook() -> None:
    """By hand: slope 6 / 10, squared residuals 2.4 over 3 degrees of freedom, t = 3.1824."""
    line = fitted_line([1, 2, 3, 4, 5], [2, 4, 5, 4, 5])
    assert (line.slope, line.intercept) == (pytest.approx(0.6), pytest.approx(2.2))
    reach = 3.18245 * (2.4 / 3 / 10) ** 0.5
    assert (line.low, line.high) == (pytest.approx(0.6 - reach, abs=1e-4), pytest.approx(0.6 + reach, abs=1e-4))


def test_a_line_through_too_little_is_refused() -> None:
    for x, y in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])):
        with pytest.raises(ValueError, match="no uncertainty"):
            fitted_line(x, y)
