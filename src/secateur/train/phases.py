"""Have the loads of the experts settled? The stable phase of LAEP (arXiv 2601.14327 describes it, without a test).

Our reading judges by what a choice would cost. Say that the idlest quarter of a layer's experts was chosen at some
moment. Its **regret** later is the share of the tokens that it carries then, minus the share of the quarter that is
idlest then. Choices age with every doubling of the tokens, so what a choice of now will cost at the end is told from
those made since a fifth of the tokens: their mean regret, times the doublings that are to come. Loads are stable when
that is little. The horizon grows with the run, so the length of a window, the size of a batch and the learning rate do
not decide.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import SecateurError
from secateur.train.load_history import LoadHistory, Loads, Mark

Phase = Literal["begin", "warm-up", "unknown", "unlearned", "moving", "stable"]
PHASES: tuple[Phase, ...] = get_args(Phase)
NUMBERS = ("regret", "noise", "change", "tokens_needed")  # of a report

LEAST_AHEAD = 1.0  # doublings of the tokens: beyond the middle of a run nothing is easier than there
UNKNOWN_AHEAD = 2.5  # where nobody knows the end
LOOKS = tuple(part / 20 for part in range(4, 20))  # of the tokens so far: the moments that are looked back at
RECENT = 0.125  # of the tokens so far: what counts as a moment ...
LEAST = 3  # ... and so many windows, where there are as many
IDLE = 4  # one in four experts is chosen
SAMPLES = 33  # of a moment's loads
PAIRS = 64  # of samples that are compared, over all layers
SURELY = 2  # a regret so many times the noise above its limit is no noise


@dataclass(frozen=True, kw_only=True)
class PhaseConstants:
    """What counts as stable.

    Args:
        max_regret: that a choice of now is expected to have at the end of the run, as a share of a layer's tokens, mean
            over the layers.
        max_noise: regret that sampling alone would make; above it the phase is unknown.
        min_change: share of the tokens that must go to other experts than in the first window, so that loads which
            an untrained router came with do not count as settled. 0 for a model that was trained before.
        min_windows: before so many there is too little to look back at.

    Raises:
        SecateurError: a value out of range.
    """

    max_regret: float = 0.025
    max_noise: float = 0.005
    min_change: float = 0.1
    min_windows: int = 16

    def __post_init__(self) -> None:
        if type(self.min_windows) is not int or self.min_windows < 2:
            raise SecateurError(f"min_windows is {self.min_windows!r}, expected a whole number of at least 2")
        for name in ("max_regret", "max_noise", "min_change"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise SecateurError(f"{name} is {value!r}, expected a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """The phase of a run at the end of a window, and the numbers that say so, means over the layers.

    regret: expected at the end of the run, of a choice of now. noise: the regret that sampling alone makes. change:
    share of the tokens that go to other experts than in the first window. tokens_needed: about how many tokens a moment
    must have for max_noise; None where it has them. All but the phase are None at the begin.
    """

    phase: Phase
    regret: float | None = None
    noise: float | None = None
    change: float | None = None
    tokens_needed: int | None = None

    @property
    def stable(self) -> bool:
        return self.phase == "stable"


def phase_of(
    history: LoadHistory,
    constants: PhaseConstants,
    *,
    rises: bool = False,
    learned: bool = False,
    ahead: float = UNKNOWN_AHEAD,
) -> PhaseReport:
    """The phase of a run after the windows so far.

    Args:
        rises: the learning rate still rises. learned: loads had left their start before this history began. ahead:
            doublings of the tokens that are to come, see `doublings_ahead`.
    """
    if history.num_windows < constants.min_windows:
        return PhaseReport(phase="begin")
    recent = recent_loads(history)
    regret = ahead * _mean([mean_regret(moment(history, look * history.num_tokens), recent) for look in LOOKS])
    noise = noise_of(history)
    change = _mean([total_variation(history.marks[1].sums[layer], recent[layer]) for layer in recent])
    needed = None
    if noise > constants.max_noise > 0:  # the regret of noise goes down with the root of the tokens, or faster
        needed = math.ceil(RECENT * history.num_tokens * (noise / constants.max_noise) ** 2)
    phase: Phase
    if rises:
        phase = "warm-up"
    elif regret > constants.max_regret + SURELY * noise * ahead:
        phase = "moving"
    elif noise > constants.max_noise:
        phase = "unknown"
    elif change < constants.min_change and not learned:
        phase = "unlearned"
    else:
        phase = "moving" if regret > constants.max_regret else "stable"
    return PhaseReport(phase=phase, regret=regret, noise=noise, change=change, tokens_needed=needed)


def doublings_ahead(history: LoadHistory, to_come: float | None) -> float:
    """How often the tokens of a history will double, at least LEAST_AHEAD.

    Args:
        to_come: tokens until the end of the run, None where it is not known.
    """
    if to_come is None:
        return UNKNOWN_AHEAD
    return max(LEAST_AHEAD, math.log2(1 + to_come / history.num_tokens))


def recent_loads(history: LoadHistory) -> Loads:
    """{layer: tokens of each expert} over the last part of the history, which is a choice's moment."""
    return moment(history, history.num_tokens)


def recent_tokens(history: LoadHistory) -> int:
    """How many tokens had the loads that `recent_loads` gives?"""
    first, last = _ends(history, history.num_tokens)
    return last.tokens - first.tokens


def moment(history: LoadHistory, tokens: float) -> Loads:
    """The loads at the time when so many tokens had been seen: of the windows just before, as wide as a moment is."""
    return history.between(*_ends(history, tokens))


def _ends(history: LoadHistory, tokens: float) -> tuple[Mark, Mark]:
    last = max(1, history.mark_at(tokens))
    return history.marks[_begin(history, last)], history.marks[last]


def _begin(history: LoadHistory, last: int) -> int:
    """The mark at which the moment begins that ends at the mark `last`. Joined windows are longer than LEAST anyway."""
    begin = history.mark_at(history.marks[last].tokens - RECENT * history.num_tokens)
    return max(0, min(begin, last - LEAST))


def noise_of(history: LoadHistory) -> float:
    """The regret that one sample of the last moment's loads would have of another, mean over the layers."""
    recent, spread = recent_loads(history), dispersion(history)
    pairs = min(SAMPLES - 1, max(2, PAIRS // len(recent)))
    return _mean([sampling_regret(loads, spread, pairs, index) for index, loads in enumerate(recent.values())])


def sampling_regret(loads: Sequence[int], spread: float, pairs: int = SAMPLES - 1, first: int = 0) -> float:
    """The mean regret that samples have of each other which are drawn around `loads`.

    Args:
        loads: (E,) tokens of each expert. spread: the variance of a load over the load; 1 where tokens choose their
            experts independently of each other. pairs: of samples. first: of SAMPLES, so that layers differ.
    """
    deviations = [math.sqrt(spread * load) for load in loads]
    drawn = normals(len(loads))
    samples = [
        [max(0.0, load + z * by) for load, by, z in zip(loads, deviations, drawn[(first + i) % SAMPLES], strict=True)]
        for i in range(pairs + 1)
    ]
    return _mean([regret(chosen_by, now) for chosen_by, now in itertools.pairwise(samples) if sum(now) > 0] or [1.0])


def dispersion(history: LoadHistory) -> float:
    """How much more the loads of the last moment vary from window to window than independent tokens would, at least 1.

    Pearson's chi-squared of its windows over the degrees of freedom, all layers together.
    """
    last = len(history.marks) - 1
    begin = _begin(history, last)
    whole = history.between(history.marks[begin], history.marks[last])
    parts = [history.between(history.marks[i], history.marks[i + 1]) for i in range(begin, last)]
    squares = freedom = 0.0
    for layer, loads in whole.items():
        total, routed = sum(loads), [expert for expert, load in enumerate(loads) if load]
        freedom += (len(parts) - 1) * (len(routed) - 1)
        for part in parts:
            tokens = sum(part[layer])
            for expert in routed:
                expected = tokens * loads[expert] / total
                squares += (part[layer][expert] - expected) ** 2 / expected
    return max(1.0, squares / freedom) if freedom else 1.0


@functools.cache
def normals(num_experts: int) -> tuple[tuple[float, ...], ...]:
    """SAMPLES times (E,) normal numbers, the same at every call, so that a resumed run finds the same phases."""
    draw = random.Random(0)
    return tuple(tuple(draw.gauss(0, 1) for _ in range(num_experts)) for _ in range(SAMPLES))


def mean_regret(chosen_by: Loads, now: Loads) -> float:
    """`regret`, mean over the layers."""
    return _mean([regret(chosen_by[layer], now[layer]) for layer in now])


def regret(chosen_by: Sequence[float], now: Sequence[float]) -> float:
    """What the idlest quarter by the loads `chosen_by` carries of the loads `now`, over what the idlest quarter does.

    Args:
        chosen_by, now: (E,) tokens of each expert of a layer.

    Returns:
        A share of the tokens, 0 or more.
    """
    size = max(1, len(now) // IDLE)
    # as `removal_order`, in half the time: of equal loads the higher id goes first
    chosen = sorted(range(len(now) - 1, -1, -1), key=chosen_by.__getitem__)[:size]
    return (sum(now[expert] for expert in chosen) - sum(sorted(now)[:size])) / sum(now)


def total_variation(a: Sequence[int], b: Sequence[int]) -> float:
    """Half the summed difference of the shares of two loads: 0 for equal shares, 1 for disjoint ones.

    Raises:
        SecateurError: loads of different length, or without a token.
    """
    if len(a) != len(b) or not sum(a) or not sum(b):
        raise SecateurError(
            f"loads {list(a)!r:.100} and {list(b)!r:.100} cannot be compared, expected as many, not all 0"
        )
    total_a, total_b = sum(a), sum(b)
    return sum(abs(x * total_b - y * total_a) for x, y in zip(a, b, strict=True)) / (2 * total_a * total_b)


def in_words(report: PhaseReport, constants: PhaseConstants | None = None) -> str:
    """The phase and the number that decides it, short enough for a progress line; with constants also its limit, and
    how many tokens are missing."""
    deciding = {"unknown": "noise", "unlearned": "change", "moving": "regret", "stable": "regret"}.get(report.phase)
    if deciding is None:
        return report.phase
    said = f"{report.phase}, {deciding} {_percent(getattr(report, deciding))}"
    if constants is None:
        return said
    name = "min_change" if deciding == "change" else f"max_{deciding}"
    limit = f"{name} {_percent(getattr(constants, name))}"
    if report.phase == "unknown" and report.tokens_needed is not None:
        limit += f"; an eighth of the run needs about {report.tokens_needed:,} tokens"
    return f"{said} ({limit})"


def _percent(share: float) -> str:
    """0.0123 -> "1.23%", 0.5 -> "50%"."""
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2f}%"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
