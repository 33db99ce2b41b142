"""The statistics that the evidence for LAEP is judged by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

SURE = 0.95  # of a range


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences a - b of runs that share a seed: mean, standard deviation, range of the mean, two-sided p (t-test).

    low, high and p are None for fewer than two pairs; p is None where all differences are equal.
    """

    mean: float
    deviation: float
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
        return Paired(mean=mean, deviation=0.0, low=None, high=None, p=None, pairs=1)
    deviation = statistics.stdev(differences)
    error = deviation / math.sqrt(len(differences))
    reach = error * float(stats.t.ppf((1 + SURE) / 2, len(differences) - 1))
    p = None if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, len(differences) - 1))
    return Paired(mean=mean, deviation=deviation, low=mean - reach, high=mean + reach, p=p, pairs=len(differences))


@dataclass(frozen=True, kw_only=True)
class Line:
    """y = intercept + slope * x by least squares, and the range of the slope."""

    slope: float
    intercept: float
    low: float
    high: float


def fitted_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """
    Raises:
        ValueError: fewer than three points, or one x for all.
    """
    if len(x) != len(y) or len(x) < 3 or len(set(x)) == 1:
        raise ValueError(f"a line through {len(x)} points with {len(set(x))} different x has no uncertainty")
    found = stats.linregress(x, y)
    reach = float(found.stderr) * float(stats.t.ppf((1 + SURE) / 2, len(x) - 2))
    slope = float(found.slope)
    return Line(slope=slope, intercept=float(found.intercept), low=slope - reach, high=slope + reach)
