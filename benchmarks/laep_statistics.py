"""The statistics that the evidence for LAEP is judged by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SURE = 0.95  # of a range


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences a - b of runs that share a seed: mean, standard deviation, range of the mean, two-sided p (t-test).

    All but the mean are None for fewer than two pairs; p is None where all differences are equal.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    p: float | None
    pairs: int


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """
    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Paired(mean=mean, deviation=None, low=None, high=None, p=None, pairs=1)
    deviation = statistics.stdev(differences)
    error = deviation / math.sqrt(len(differences))
    reach = error * float(stats.t.ppf((1 + SURE) / 2, len(differences) - 1))
    p = None if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, len(differences) - 1))
    return Paired(mean=mean, deviation=deviation, low=mean - reach, high=mean + reach, p=p, pairs=len(differences))


@dataclass(frozen=True, kw_only=True)
class Slope:
    """What one more of x adds to y, with its range."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """y = intercept + sum of slope * x by least squares."""

    intercept: float
    slopes: tuple[Slope, ...]
    covariance: np.ndarray  # (1 + number of x, the same), of intercept and slopes
    reach: float  # a range is so many standard errors to both sides

    def at(self, *x: float) -> tuple[float, float, float]:
        """(value, low, high) of the fitted mean."""
        row = np.array([1.0, *x])
        value = self.intercept + sum(slope.value * one for slope, one in zip(self.slopes, x, strict=True))
        error = self.reach * math.sqrt(float(row @ self.covariance @ row))
        return value, value - error, value + error


def fitted(y: Sequence[float], *x: Sequence[float]) -> Fit:
    """Points are taken as independent: average what belongs together before.

    Args:
        y: a value for each point. x: for each quantity that y is fitted over, one for each point.

    Raises:
        ValueError: too few points for an uncertainty, or quantities that do not vary independently.
    """
    rows = np.column_stack([np.ones(len(y)), *x])
    free = len(y) - rows.shape[1]
    if free < 1 or np.linalg.matrix_rank(rows) < rows.shape[1]:
        raise ValueError(f"a fit of {len(y)} points over {len(x)} quantities has no uncertainty")
    values, *_ = np.linalg.lstsq(rows, np.array(y), rcond=None)
    variance = float(np.square(np.array(y) - rows @ values).sum()) / free
    covariance = variance * np.linalg.inv(rows.T @ rows)
    reach = float(stats.t.ppf((1 + SURE) / 2, free))
    errors = reach * np.sqrt(np.diag(covariance))
    slopes = [
        Slope(value=float(value), low=float(value - error), high=float(value + error))
        for value, error in zip(values[1:], errors[1:], strict=True)
    ]
    return Fit(intercept=float(values[0]), slopes=tuple(slopes), covariance=covariance, reach=reach)
