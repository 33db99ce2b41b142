"""The detector says "stable" exactly when its two comparisons held long enough in enough layers."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.train.phases import PhaseConstants, StablePhaseDetector, spearman, total_variation

UP = [10, 20, 30, 40]
DOWN = [40, 30, 20, 10]


def noisy(rng: random.Random, noise: float) -> dict[int, list[int]]:
    return {layer: [1 + int(100 * i * (1 + noise * rng.random())) for i in range(8)] for layer in range(3)}


def test_spearman_golden_values() -> None:
    assert spearman(UP, UP) == 1.0
    assert spearman(UP, DOWN) == -1.0
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)  # textbook, with a tie
    assert spearman([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]) == (
        pytest.approx(-29 / 165)
    )


def test_spearman_depends_on_ranks_only_and_is_symmetric() -> None:
    rng = random.Random(0)
    for _ in range(100):
        a = [rng.randrange(6) for _ in range(7)]
        b = [rng.randrange(6) for _ in range(7)]
        assert spearman(a, b) == spearman(b, a) == spearman([x**3 + 5 for x in a], b)
        assert -1 <= spearman(a, b) <= 1


def test_spearman_equals_pearson_of_average_ranks() -> None:
    rng = random.Random(1)
    for _ in range(100):
        a, b = ([rng.randrange(9) for _ in range(6)] for _ in range(2))
        ranks = [[sum(y < x for y in v) + (1 + sum(y == x for y in v)) / 2 for x in v] for v in (a, b)]
        centred = [[x - sum(r) / 6 for x in r] for r in ranks]
        norm = math.sqrt(math.prod(sum(x * x for x in c) for c in centred))
        if norm:
            expected = sum(x * y for x, y in zip(*centred, strict=True)) / norm
            assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_constant_vectors_is_defined() -> None:
    assert spearman([3, 3, 3], [7, 7, 7]) == 1.0
    assert spearman([3, 3, 3], [1, 2, 3]) == 0.0
    assert spearman([1, 2, 3], [3, 3, 3]) == 0.0
    assert spearman([5], [9]) == 1.0


def test_total_variation_golden_values() -> None:
    assert total_variation(UP, [2 * load for load in UP]) == 0.0
    assert total_variation([1, 0], [0, 9]) == 1.0
    assert total_variation(UP, DOWN) == 0.4
    assert total_variation([50, 50], [55, 45]) == 0.05


def test_stable_needs_windows_minus_one_good_comparisons() -> None:
    for windows in (2, 3, 5):
        detector = StablePhaseDetector(PhaseConstants(windows=windows))
        seen = [detector.update({0: UP}).stable for _ in range(windows + 2)]
        assert seen == [False] * (windows - 1) + [True] * 3


def test_one_bad_comparison_starts_the_count_again() -> None:
    detector = StablePhaseDetector(PhaseConstants(windows=3))
    seen = [detector.update({0: loads}).stable for loads in (UP, UP, DOWN, DOWN, DOWN, UP)]
    assert seen == [False, False, False, False, True, False]


def test_rank_correlation_and_distance_are_both_needed() -> None:
    same_ranks_other_shares = StablePhaseDetector(PhaseConstants(windows=2))
    same_ranks_other_shares.update({0: [1, 2, 3, 4]})
    report = same_ranks_other_shares.update({0: [1, 2, 3, 94]})
    assert (report.stable, report.rank_correlation[0]) == (False, 1.0)
    assert report.total_variation[0] == pytest.approx(0.54)

    same_shares_other_ranks = StablePhaseDetector(PhaseConstants(windows=2))
    same_shares_other_ranks.update({0: [100, 101, 102, 103]})
    report = same_shares_other_ranks.update({0: [103, 102, 101, 100]})
    assert (report.stable, report.rank_correlation[0]) == (False, -1.0)
    assert report.total_variation[0] < 0.05


def test_constants_are_inclusive_limits() -> None:
    loads = ({0: [50, 50], 1: [1, 2]}, {0: [55, 45], 1: [1, 2]})
    for limit, stable in ((0.05, True), (0.0499, False)):
        detector = StablePhaseDetector(
            PhaseConstants(windows=2, max_total_variation=limit, min_rank_correlation=0, min_stable_layers=1)
        )
        detector.update(loads[0])
        assert detector.update(loads[1]).stable is stable


@pytest.mark.parametrize(("needed", "stable"), [(0.95, True), (0.96, False)])
def test_a_share_of_the_layers_is_enough(needed: float, stable: bool) -> None:
    detector = StablePhaseDetector(PhaseConstants(windows=2, min_stable_layers=needed))
    detector.update(dict.fromkeys(range(20), UP))
    report = detector.update({**dict.fromkeys(range(20), UP), 7: DOWN})
    assert (report.stable, report.stable_share) == (stable, 0.95)
    assert len(report.rank_correlation) == len(report.total_variation) == 20


def test_first_window_has_nothing_to_compare() -> None:
    report = StablePhaseDetector().update({0: UP})
    assert (report.stable, report.stable_share, report.rank_correlation, report.total_variation) == (False, 0.0, {}, {})


def test_restored_detector_goes_on_identically() -> None:
    rng = random.Random(0)
    windows = [noisy(rng, noise) for noise in (3, 0.1, 0.05, 2, 0.02, 0.02, 0.02, 0.02)]
    whole = StablePhaseDetector()
    reports = [whole.update(window) for window in windows]
    assert {report.stable for report in reports} == {True, False}
    for cut in range(len(windows)):
        first = StablePhaseDetector()
        for window in windows[:cut]:
            first.update(window)
        second = StablePhaseDetector()
        second.restore(json.loads(json.dumps(first.state())))
        assert [second.update(window) for window in windows[cut:]] == reports[cut:]
        assert second.state() == whole.state()


def test_reset_forgets_everything() -> None:
    detector = StablePhaseDetector(PhaseConstants(windows=2))
    fresh = detector.state()
    detector.update({0: UP})
    detector.reset()
    assert detector.state() == fresh
    assert not detector.update({0: [1, 2], 1: [3]}).stable


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({}, "no layer"),
        ({0: UP, 1: [0, 0]}, "window, layer 1: no token was routed to any of its 2 experts"),
        ({0: UP}, r"layers \[1\] have \[0\] experts, but \[2\] in the window before; reset"),
        ({0: UP[:3], 1: [1, 2]}, r"layers \[0\] have \[3\] experts, but \[4\]"),
        ({0: UP, 1: [1, 2], 2: [1]}, r"layers \[2\] have \[1\] experts, but \[0\]"),
    ],
)
def test_an_unusable_window_is_refused_and_changes_nothing(loads: Any, message: str) -> None:
    detector = StablePhaseDetector()
    detector.update({0: UP, 1: [1, 2]})
    before = detector.state()
    with pytest.raises(SecateurError, match=message):
        detector.update(loads)
    assert detector.state() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": 1}, "windows is 1"),
        ({"windows": 3.0}, "windows is 3.0"),
        ({"min_rank_correlation": 1.1}, "min_rank_correlation is 1.1"),
        ({"max_total_variation": -0.1}, "max_total_variation is -0.1"),
        ({"max_total_variation": math.nan}, "max_total_variation is nan"),
        ({"min_stable_layers": 0}, "min_stable_layers is 0"),
        ({"min_stable_layers": 2}, "min_stable_layers is 2"),
    ],
)
def test_constants_out_of_range_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        PhaseConstants(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "'format' is 'other', expected 'secateur-phase-detector'"),
        ({"version": 2}, "'version' is 2, expected 1"),
        ({"constants": {"windows": 4}}, "the saved constants are"),
        ({"previous": 3}, "'previous' is 3, expected an object"),
        ({"streak": {"x": 1}}, "'streak' has the key 'x', expected a layer id"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    detector = StablePhaseDetector()
    detector.update({0: UP})
    before = detector.state()
    with pytest.raises(SecateurError, match=message):
        detector.restore({**before, **change})
    assert detector.state() == before


def test_comparing_loads_of_different_length_is_refused() -> None:
    for compare in (spearman, total_variation):
        with pytest.raises(SecateurError, match="loads of 2 and of 1 experts"):
            compare([1, 2], [1])
        with pytest.raises(SecateurError, match="loads of 0 and of 0"):
            compare([], [])
