"""Interrupt a command: one line, status 130 or 143, and nothing is left but what the same command goes on from."""

from __future__ import annotations

import random
import signal

from faults_campaign.cases import Case
from faults_campaign.forked import Ended
from faults_campaign.kills import PARTIAL, ends_right, half_written, in_words, last_line, phase_of, point_of, read_only
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row
from faults_campaign.stage import Stage
from faults_campaign.trees import Tree, tree_of

# What a process is ended by, with the statuses that a shell shows alike: its own, or the signal itself.
STATUSES = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


def interrupt(stage: Stage, case: Case, number: int, seed: int) -> Row:
    """One trial of a case; SIGINT and SIGTERM in turn, at an event or a while after it."""
    reference = stage.reference(case)
    draw = random.Random(f"{seed} signal {case.name} {number}")
    what = list(STATUSES)[number % 2]
    phase, turn = phase_of(reference, number // 2)
    point = point_of(reference, phase, turn, draw, do=what)
    stage.fresh(case)
    ended = stage.start(case, point=point)
    found = tree_of(stage.trial)
    wrong = wrong_end(ended, what, found)
    wrong = wrong or half_written(case, found, reference) or read_only(case, found, reference)
    is_late = ended.status == 0 and found == reference.after  # it came when nothing was left to do
    if not wrong and not is_late:
        wrong = ends_right(case, reference, found, stage.again(case), tree_of(stage.trial))
    outcome = NOT_COUNTED if is_late or not ended.is_reached else FELL if wrong else PASSED
    where = f"{what.name} {in_words(point, reference)}"
    return Row(
        part="signal", case=case.name, number=number, phase=what.name, point=where, outcome=outcome, detail=wrong
    )


def wrong_end(ended: Ended, what: signal.Signals, found: Tree) -> str:
    """What is wrong with how a command ended after a signal; "" for nothing."""
    lines = ended.lines
    said = f"{len(lines)} lines on standard error, expected one: {last_line(ended)}"
    left = [path for path in found if PARTIAL.search(path)]
    checks = (
        (ended.hangs, "it hangs"),
        (ended.status == 0, ""),
        (
            ended.status not in STATUSES[what],
            f"status {ended.status}, expected {STATUSES[what][0]}; {last_line(ended)}",
        ),
        ("Traceback" in ended.err, f"a traceback: {last_line(ended)}"),
        (len(lines) != 1, said),
        (bool(left), f"left over: {', '.join(left[:4])}"),
    )
    return next((words for is_so, words in checks if is_so), "")
