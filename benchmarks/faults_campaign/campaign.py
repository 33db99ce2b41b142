"""The trials of a campaign: which are still to be made, how long they will take, and where each goes on."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from faults_campaign import fills
from faults_campaign.cases import CASES, Case
from faults_campaign.changes import KINDS, change
from faults_campaign.damages import EVERY, WHOLE_EVERY, Damages
from faults_campaign.fills import Fills
from faults_campaign.kills import kill, pair
from faults_campaign.readers import READERS
from faults_campaign.rows import Row, Rows
from faults_campaign.signals import interrupt
from faults_campaign.stage import Stage

LEAST = 20  # kills in each phase of a command
MOST_TRIES = 6  # trials for one that counts
# Seconds of a trial, until there are some; on two cores.
SECONDS = {"kill": 2.5, "pair": 3.0, "signal": 2.5, "fill": 2.5, "change": 2.5, "damage": 0.5}
PARTS = tuple(SECONDS)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """So many trials of a part that count, over all commands or readers."""

    part: str
    number: int


class Campaign:
    """Makes trials and keeps their rows. only: words of which one is in the name of a case; None for all."""

    def __init__(self, stage: Stage, rows: Rows, seed: int, only: list[str] | None = None) -> None:
        self._stage, self._rows, self._seed, self._only = stage, rows, seed, only
        self._fills, self._damages = Fills(stage), Damages(stage)
        self.skipped: dict[str, str] = {}

    def run(self, goals: list[Goal], until: float | None) -> None:
        """Make what is missing; stops at `until`, on the clock of time.monotonic()."""
        goals = [goal for goal in goals if not self._is_skipped(goal.part)]
        for line in self._foreseen(goals):
            print(line, flush=True)
        for goal in goals:
            for row in self._missing(goal, until):
                print(f"{row.name}: {row.phase}: {row.outcome} {row.detail[:200]}", flush=True)

    def once(self, name: str) -> None:
        """Make one trial again, by the name of its row."""
        part, rest = name.split("/", 1)
        case, _, number = rest.rpartition("/")
        if not self._is_skipped(part):
            row = self._makers(part)[case](int(number))
            print("\n".join(f"{key}: {value}" for key, value in dataclasses.asdict(row).items()))

    def _is_skipped(self, part: str) -> bool:
        if part == "fill" and not fills.may_mount():
            self.skipped[part] = "this process may not mount a file system of a set size"
            print(f"fill: skipped, {self.skipped[part]}")
        return part in self.skipped

    def _makers(self, part: str) -> Mapping[str, Callable[[int], Row]]:
        """{case: what makes the trial of a number}."""
        by_case: dict[str, Callable[[Case, int], Row]] = {
            "kill": lambda case, number: kill(self._stage, case, number, self._seed),
            "pair": lambda case, number: pair(self._stage, case, number, self._seed),
            "signal": lambda case, number: interrupt(self._stage, case, number, self._seed),
            "change": lambda case, number: change(self._stage, case, number, self._seed),
            "fill": lambda case, number: self._fills.trial(case, number, self._seed),
        }
        if part == "damage":
            return {
                one.name: lambda number, one=one: self._damages.trial(one, number)
                for one in READERS
                if self._is_meant(one.name)
            }
        make = by_case[part]
        return {case.name: lambda number, case=case: make(case, number) for case in CASES if self._is_meant(case.name)}

    def _is_meant(self, name: str) -> bool:
        return self._only is None or any(word in name for word in self._only)

    def _quota(self, part: str, case: str, number: int) -> dict[str | None, int]:
        """{phase: trials that must count}; None stands for all phases together."""
        if part == "damage":
            return {None: math.ceil(damaged_of(case, number) * WHOLE_EVERY / (WHOLE_EVERY - 1))}
        if part == "kill":
            names = {one.name: [name for name, _ in one.phases] for one in CASES}
            each = max(LEAST if number >= LEAST * len(CASES) else 1, math.ceil(number / sum(map(len, names.values()))))
            return dict.fromkeys(names[case], each)
        return {None: max(len(KINDS) if part == "change" else 1, math.ceil(number / len(CASES)))}

    def _missing(self, goal: Goal, until: float | None) -> Iterator[Row]:
        """The cases take turns, so that a slice has something of all."""
        makers = self._makers(goal.part)
        turns = {case: self._of_case(goal, case, make) for case, make in makers.items()}
        while turns:
            for case in list(turns):
                if until is not None and time.monotonic() > until:
                    return
                row = next(turns[case], None)
                if row is None:
                    del turns[case]
                else:
                    yield row

    def _of_case(self, goal: Goal, case: str, make: Callable[[int], Row]) -> Iterator[Row]:
        quota = self._quota(goal.part, case, goal.number)
        made = {row.number for row in self._rows.of(goal.part, case)}
        phases = list(quota)
        for number in range(MOST_TRIES * sum(quota.values())):
            missing = [phase for phase in phases if self._rows.counted(goal.part, case, phase) < quota[phase]]
            if not missing:
                return
            if number in made or phases[number % len(phases)] not in missing:
                continue
            started = time.monotonic()
            row = dataclasses.replace(make(number), seconds=round(time.monotonic() - started, 2))
            self._rows.add(row)
            yield row

    def _foreseen(self, goals: list[Goal]) -> Iterator[str]:
        """Trials times seconds of each part."""
        for goal in goals:
            to_go = 0
            for case in self._makers(goal.part):
                quota = self._quota(goal.part, case, goal.number)
                to_go += sum(max(0, most - self._rows.counted(goal.part, case, phase)) for phase, most in quota.items())
            took = [row.seconds for row in self._rows.of(goal.part)]
            each = sum(took) / len(took) if took else SECONDS[goal.part]
            yield f"{goal.part}: {to_go:,} trials to go x {each:.1f} s = {to_go * each / 60:.0f} min"


def damaged_of(case: str, number: int) -> int:
    """Damages of a file, of so many in all: equally many for each command that reads, at most EVERY, over its files.

    The rest goes to those that begin anew, as what goes on with unfinished work takes ten times as long.
    """
    (reader,) = (one for one in READERS if one.name == case)
    files = Counter(one.words for one in READERS)
    each = min(EVERY, number / len(files))
    anew = sum(not one.stopped for one in READERS)
    rest = 0 if reader.stopped else math.ceil((number - each * len(files)) / anew)
    return math.ceil(each / files[reader.words]) + rest
