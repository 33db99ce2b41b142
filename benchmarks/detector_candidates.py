"""Ways to tell from a load history when to prune: LAEP's own detector, and what it was tried against.

Each is a function of a history and a threshold, and returns the window at which it would fire, counted from 1, or
None. All but the old rule and the fixed fraction wait for the end of the warm-up, as LAEP's detector does.

Legend: W windows, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detector_histories import Floats, History, regret
from secateur.train.load_history import LoadHistory
from secateur.train.phases import LEAST, RECENT, UNKNOWN_AHEAD, PhaseConstants, PhaseReport, doublings_ahead, phase_of

Fires = Callable[[History, float], int | None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """fires: see above. thresholds: those that the choosing half chooses among. about: one line for the table."""

    name: str
    about: str
    fires: Fires
    thresholds: tuple[float, ...]


def reports(history: History, constants: PhaseConstants, *, end_is_known: bool = True) -> list[PhaseReport]:
    """What LAEP's own detector says after each window."""
    loads, learned, found = LoadHistory(), False, []
    for window in range(1, history.num_windows + 1):
        counts = {layer: row.tolist() for layer, row in enumerate(history.loads[window - 1])}
        loads.add(counts, history.tokens(window) - (history.tokens(window - 1) if window > 1 else 0))
        to_come = history.tokens(history.num_windows) - history.tokens(window) if end_is_known else None
        ahead = doublings_ahead(loads, to_come)
        report = phase_of(loads, constants, rises=rises(history, window), learned=learned, ahead=ahead)
        learned |= (report.change or 0) >= constants.min_change
        found.append(report)
    return found


def rises(history: History, window: int) -> bool:
    """Does the learning rate still rise in the window?"""
    before = history.learning_rate[window - 2] if window > 1 else 0.0
    return bool(history.learning_rate[window - 1] > before) or history.step(window) < history.setting.warmup


def detector(history: History, threshold: float, *, end_is_known: bool = True) -> int | None:
    """LAEP's own: mean regret of the choices made since a fifth of the tokens, times the doublings to come."""
    found = reports(history, PhaseConstants(max_regret=threshold), end_is_known=end_is_known)
    return next((window for window, report in enumerate(found, start=1) if report.stable), None)


def detector_without_end(history: History, threshold: float) -> int | None:
    """The same where nobody tells how long the run is: the doublings to come are always as many."""
    return detector(history, UNKNOWN_AHEAD * threshold, end_is_known=False)


def moment(history: History, window: int, at: float, recent: float = RECENT) -> Floats:
    """(L, E) shares in the windows just before `at` (in windows), as wide as a moment at `window` is."""
    last = max(1, math.floor(at))
    return history.between(max(0, last - max(LEAST, round(recent * window))), last)


def looking_back(share: float) -> Fires:
    """Regret of a choice made when `share` of the tokens had been seen; without noise or change."""
    return _first(lambda history, window: _back(history, window, share * window))


def _back(history: History, window: int, at: float) -> float:
    return regret(moment(history, window, at), moment(history, window, window))


def choices_since(share: float) -> Fires:
    """Mean regret of the choices made since `share` of the tokens had been seen; without noise or change."""
    looks = [look for look in np.arange(0.05, 1, 0.05) if look >= share - 1e-9]
    return _first(lambda history, window: float(np.mean([_back(history, window, look * window) for look in looks])))


def by_learning_rate(history: History, window: int) -> float:
    """Regret of a choice made when half of the learning rate, summed over the steps, had been spent."""
    spent = history.learning_rate[:window].cumsum()
    return _back(history, window, int(np.searchsorted(spent, spent[-1] / 2)) + 1)


def back_and_ahead(history: History, window: int) -> float:
    """The larger one of the regret looking back, and of today's choice if loads move on as far as they came."""
    then, now = moment(history, window, window / 2), moment(history, window, window)
    ahead = np.clip(2 * now - then, 0, None)
    return max(regret(then, now), regret(now, ahead / ahead.sum(1, keepdims=True)))


def every_choice_since(history: History, window: int) -> float:
    """The largest regret of the choices made since half as many tokens ago."""
    return max(_back(history, window, share * window) for share in (0.5, 0.6, 0.7, 0.8, 0.9))


def parallel_curves(history: History, window: int) -> float:
    """The paper's words: curves parallel for a period. Spread of the experts' log shares' changes since half ago."""
    then, now = moment(history, window, window / 2), moment(history, window, window)
    change = np.log(np.maximum(now, 1e-6)) - np.log(np.maximum(then, 1e-6))
    return float(change.std(1).mean())


def moved(history: History, window: int) -> float:
    """Share of the tokens that go elsewhere than half as many tokens ago."""
    then, now = moment(history, window, window / 2), moment(history, window, window)
    return float(np.abs(then - now).sum(1).mean() / 2)


def by_gradient(history: History, window: int) -> float:
    """Looking back with the experts' shares of the squared gradient instead of their loads."""
    assert history.gradient is not None
    width = max(LEAST, round(RECENT * window))
    sums = [history.gradient[max(0, last - width) : last].sum(0) for last in (max(1, window // 2), window)]
    then, now = (one / np.maximum(one.sum(1, keepdims=True), 1) for one in sums)
    return regret(then, now)


def sure_gates(history: History, window: int) -> float:
    """By how much the margin of the last chosen expert's logit has grown since half as many tokens ago."""
    assert history.margin is not None
    width = max(LEAST, round(RECENT * window))
    then, now = (history.margin[max(0, last - width) : last].mean(0) for last in (max(1, window // 2), window))
    return float(np.abs(now / np.maximum(then, 1e-9) - 1).mean())


def flat_loss(history: History, window: int) -> float:
    """By how much the loss has fallen since half as many tokens ago, relative."""
    width = max(LEAST, round(RECENT * window))
    then, now = (history.loss[max(0, last - width) : last].mean() for last in (max(1, window // 2), window))
    return float(1 - now / then)


def old_rule(history: History, threshold: float) -> int | None:
    """Before: three windows with Spearman >= 1 - threshold and a total variation <= 5/3 threshold, in 95 % of layers.

    0.03 are the constants that were the default. It did not look at the learning rate.
    """
    streak = np.zeros(history.loads.shape[1])
    for window in range(2, history.num_windows + 1):
        before, now = history.between(window - 2, window - 1), history.between(window - 1, window)
        distance = np.abs(before - now).sum(1) / 2
        holds = (spearman(before, now) >= 1 - threshold) & (distance <= threshold * 5 / 3)
        streak = np.where(holds, streak + 1, 0)
        if (streak >= 2).mean() >= 0.95:
            return window
    return None


def spearman(a: Floats, b: Floats) -> Floats:
    """(L,) rank correlations of the rows; equal values share the average of their ranks."""
    from scipy.stats import rankdata

    ranks = [rankdata(one, axis=1) for one in (a, b)]
    centred = [one - one.mean(1, keepdims=True) for one in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return np.asarray((centred[0] * centred[1]).sum(1) / np.maximum(spread, 1e-12))


def fixed_fraction(history: History, threshold: float) -> int | None:
    """At this share of the run, whatever the loads do."""
    return max(1, math.ceil(threshold * history.num_windows))


def _first(number: Callable[[History, int], float]) -> Fires:
    """The first window after the warm-up at which `number` is at most the threshold."""

    def fires(history: History, threshold: float) -> int | None:
        windows = range(PhaseConstants().min_windows, history.num_windows + 1)
        return next((w for w in windows if not rises(history, w) and number(history, w) <= threshold), None)

    return fires


REGRETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03)
SHARES: Sequence[float] = tuple(share / 100 for share in range(5, 100, 5))

CANDIDATES = (
    Candidate(
        name="choices since 1/5, and to the end",
        about="LAEP's detector",
        fires=detector,
        thresholds=(0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06),
    ),
    Candidate(
        name="choices since 1/5", about="the same, end not known", fires=detector_without_end, thresholds=REGRETS
    ),
    Candidate(name="choices since 1/5, regret alone", about="", fires=choices_since(0.2), thresholds=REGRETS),
    Candidate(name="choices since 1/3", about="", fires=choices_since(0.35), thresholds=REGRETS),
    Candidate(name="choices since half", about="", fires=choices_since(0.5), thresholds=REGRETS),
    Candidate(name="the choice at 1/4", about="", fires=looking_back(0.25), thresholds=(*REGRETS, 0.05, 0.1)),
    Candidate(name="the choice at half", about="", fires=looking_back(0.5), thresholds=REGRETS),
    Candidate(name="the choice at 3/4", about="", fires=looking_back(0.75), thresholds=REGRETS),
    Candidate(
        name="the choice at half the learning rate",
        about="time is the summed learning rate",
        fires=_first(by_learning_rate),
        thresholds=REGRETS,
    ),
    Candidate(
        name="the choice at half, and ahead",
        about="also if loads move on as far",
        fires=_first(back_and_ahead),
        thresholds=REGRETS,
    ),
    Candidate(name="the worst choice since half", about="", fires=_first(every_choice_since), thresholds=REGRETS),
    Candidate(
        name="parallel curves",
        about="the paper's own words",
        fires=_first(parallel_curves),
        thresholds=(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    ),
    Candidate(
        name="moved tokens",
        about="total variation since half",
        fires=_first(moved),
        thresholds=(0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3),
    ),
    Candidate(name="gradient share", about="first seed", fires=_first(by_gradient), thresholds=(*REGRETS, 0.05, 0.1)),
    Candidate(
        name="sure gates",
        about="margins level off; first seed",
        fires=_first(sure_gates),
        thresholds=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    ),
    Candidate(
        name="flat loss",
        about="",
        fires=_first(flat_loss),
        thresholds=(0.01, 0.02, 0.03, 0.05, 0.07, 0.1),
    ),
    Candidate(
        name="old rule",
        about="before; no warm-up",
        fires=old_rule,
        thresholds=(0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
    ),
)
