"""When should LAEP prune? Replays recorded load histories through its detector, other ways to tell, and fixed times.

    python benchmarks/detector.py                         on the histories in benchmarks/results
    python benchmarks/detector.py --recorded WORK --store on those of detector_record.py, which are packed there

Regret: the share of the tokens that the quarter which is idlest at that moment carries at the end of the run, minus
what the finally idlest quarter does, in points, mean over the layers. A history in which a way never fires counts with
its regret of the last window. Thresholds are chosen on one half of the settings, figures come from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector_candidates import CANDIDATES, SHARES, Candidate, fixed_fraction, moment, old_rule, reports, rises
from detector_grid import CHOOSING, JUDGING
from detector_histories import History, load_histories, load_recorded, pack
from record import parser_for, results_in, show, store
from secateur.train.phases import PhaseConstants

EARLY = 0.4  # of the run
SETTLED = 1.0  # points of regret at EARLY, below which a history has settled
NEAR = 0.3  # points: so near to zero nobody asks how a fixed fraction does
MOST_LATE = 0.8  # of the settled histories must be found before EARLY, and of all must be found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a way to tell comes to on some histories; shares from 0 to 1, regrets in points.

    fraction: of the run, mean, 1 where it never fires. fixed: the mean regret of pruning all at that fraction.
    """

    regret: float
    worst: float
    fixed: float
    fraction: float
    fired: float
    early: float
    in_warmup: int

    @property
    def reaches(self) -> bool:
        """The goals of the issue that this benchmark was made for."""
        low = self.regret <= max(NEAR, self.fixed / 2)
        return low and self.fired >= MOST_LATE and self.early >= MOST_LATE and not self.in_warmup


def outcome(histories: Sequence[History], fires: Callable[[History], int | None]) -> Outcome:
    """Of a way to tell."""
    found = [fires(one) for one in histories]
    fractions = [_fraction(one, window) for one, window in zip(histories, found, strict=True)]
    regrets = [regret_at(one, window or one.num_windows) for one, window in zip(histories, found, strict=True)]
    fraction = float(np.mean(fractions))
    settled = [regret_at(one, _at(one, EARLY)) < SETTLED for one in histories]
    early = [
        w is not None and f < EARLY for w, f, is_settled in zip(found, fractions, settled, strict=True) if is_settled
    ]
    return Outcome(
        regret=float(np.mean(regrets)),
        worst=max(regrets),
        fixed=float(np.mean([regret_at(one, _at(one, fraction)) for one in histories])),
        fraction=fraction,
        fired=float(np.mean([window is not None for window in found])),
        early=float(np.mean(early)) if early else 0.0,
        in_warmup=sum(window is not None and rises(one, window) for one, window in zip(histories, found, strict=True)),
    )


def regret_at(history: History, window: int) -> float:
    """Of the choice that LAEP would make at the end of a window."""
    return history.regret(moment(history, window, window))


def chosen(candidate: Candidate, histories: Sequence[History]) -> float:
    """The threshold that does best: the most goals reached, then the least regret."""

    def worth(threshold: float) -> tuple[Any, ...]:
        found = outcome(histories, lambda one: candidate.fires(one, threshold))
        missing = max(0.0, MOST_LATE - found.fired) + max(0.0, MOST_LATE - found.early)
        over = max(0.0, found.regret - max(NEAR, found.fixed / 2))
        return round(missing, 2) + over, found.regret

    return min(candidate.thresholds, key=worth)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--recorded", type=Path, help="the work folder of detector_record.py")
    arguments = parser.parse_args()
    if arguments.recorded:
        pack(load_recorded(arguments.recorded), results_in(arguments.store))
    histories = load_histories(results_in((arguments.store and bool(arguments.recorded)) or not arguments.recorded))
    halves = {half: [one for one in histories if one.setting.half == half] for half in (CHOOSING, JUDGING)}
    print({half: len(ones) for half, ones in halves.items()}, "histories")
    rows, kept = [], []
    for candidate in CANDIDATES:
        with_signals = [[one for one in halves[half] if _has(one, candidate)] for half in (CHOOSING, JUDGING)]
        threshold = chosen(candidate, with_signals[0])
        rows.append(_row(candidate.name, candidate.about, threshold, with_signals[1], candidate.fires, kept))
    rows.append(_row("old rule, its constants", "", 0.03, halves[JUDGING], old_rule, kept))
    best = min(SHARES, key=lambda share: float(np.mean([regret_at(one, _at(one, share)) for one in halves[CHOOSING]])))
    for share in sorted({0.1, 0.2, 0.3, 0.4, 0.5, best}):
        rows.append(_row("fixed fraction", f"{share:.0%} of the run", share, halves[JUDGING], fixed_fraction, kept))
    columns = [
        "way",
        "",
        "threshold",
        "regret",
        "worst",
        "fixed fraction as early",
        "mean time",
        "fires",
        "early",
        "in warm-up",
    ]
    show(f"judged on {len(halves[JUDGING])} histories; regret in points of the tokens", columns, rows)
    told = [_told(one) for one in histories]
    for path in [
        store("detector", {"ways": kept, "histories": told, "table": [columns, *rows]}, stored=arguments.store)
    ]:
        print(path)


def _row(
    name: str,
    about: str,
    threshold: float,
    histories: Sequence[History],
    fires: Callable[[History, float], int | None],
    kept: list[dict[str, Any]],
) -> list[str]:
    found = outcome(histories, lambda one: fires(one, threshold))
    kept.append({"way": name, "about": about, "threshold": threshold, "histories": len(histories), **vars(found)})
    return [
        name,
        about,
        f"{threshold:g}",
        f"{found.regret:.2f}",
        f"{found.worst:.2f}",
        f"{found.fixed:.2f}",
        f"{found.fraction:.0%}",
        f"{found.fired:.0%}",
        f"{found.early:.0%}",
        str(found.in_warmup),
    ]


def _told(history: History) -> dict[str, Any]:
    """One history, by LAEP's detector with its defaults."""
    found = reports(history, PhaseConstants())
    window = next((number for number, report in enumerate(found, start=1) if report.stable), None)
    return {
        "name": history.name,
        "half": history.setting.half,
        "balance": history.setting.balance,
        "stable_at": None if window is None else history.step(window),
        "fraction": _fraction(history, window),
        "regret": regret_at(history, window or history.num_windows),
        "regret_at_40_percent": regret_at(history, _at(history, EARLY)),
        "last_phase": found[-1].phase,
    }


def _has(history: History, candidate: Candidate) -> bool:
    return history.gradient is not None or candidate.name not in ("gradient share", "sure gates")


def _fraction(history: History, window: int | None) -> float:
    return 1.0 if window is None else window / history.num_windows


def _at(history: History, share: float) -> int:
    return max(1, round(share * history.num_windows))


if __name__ == "__main__":
    main()
