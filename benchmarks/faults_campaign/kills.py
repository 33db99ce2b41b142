"""Kill a command, start it again: nothing half-written has a name, and what comes of it is what came undisturbed."""

from __future__ import annotations

import random
import re
import signal
from typing import Any

from faults_campaign.cases import Case
from faults_campaign.events import Point
from faults_campaign.forked import Child, Ended
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row
from faults_campaign.stage import Reference, Stage
from faults_campaign.trees import Tree, difference, has_written, tree_of, under, without

MOST_KILLS = 3  # in a row
# Names of what is half-written: no start goes on from it.
PARTIAL = re.compile(r"(^|/)\.[^/]+(\.[0-9a-f]{16}|\.partial)(/|$)")


def point_of(reference: Reference, phase: str, number: int, draw: random.Random, do: Any = signal.SIGKILL) -> Point:
    """Every event of a phase in turn, in an order of its own each round; every second time a while after it.

    Events before the first byte are left out, but for the last of them, after which it comes.
    """
    events = [event for event, name in enumerate(reference.phases, start=1) if name == phase]
    at = [event for event in events if reference.events[event - 1].is_written]
    after = [event for event in events if reference.is_written_after(event)]
    turn, is_after = divmod(number, 2)
    meant = (after if is_after or not at else at) or events
    event = random.Random(f"{phase} {turn // len(meant)}").sample(meant, len(meant))[turn % len(meant)]
    delay = round(draw.uniform(0.0, 1.2) * reference.gap_after(event), 4) if meant is not at else None
    return Point(event=event, delay=delay, do=do)


def in_words(point: Point, reference: Reference) -> str:
    event = reference.events[min(point.event, len(reference.events)) - 1]
    after = "at" if point.delay is None else f"{1000 * point.delay:.0f} ms after"
    return f"{after} event {point.event} ({event.what} {event.path})"


def half_written(case: Case, found: Tree, reference: Reference) -> str:
    """What lies under the name of a result and is not what an undisturbed run leaves there; "" for nothing."""
    said = []
    for name in case.results:
        mine = under(found, [name])
        if not mine or mine == under(reference.before, [name]):
            continue
        expected = under(reference.after, [name])
        late = [one for one in case.late if one not in mine]
        mine = {path: one for path, one in mine.items() if not is_unfinished(path, case.late)}
        if wrong := difference(mine, without(expected, late)):
            said.append(f"{name}: {wrong}")
    return "; ".join(said)


def is_unfinished(path: str, names: tuple[str, ...]) -> bool:
    """Whether it is what an atomic write of one of these files has before its rename; the next start removes it."""
    return any(re.fullmatch(rf"{re.escape(one)}\.[0-9a-f]{{16}}", path) for one in map(_hidden, names))


def _hidden(name: str) -> str:
    folder, _, own = name.rpartition("/")
    return f"{folder}/.{own}"


def read_only(case: Case, found: Tree, reference: Reference) -> str:
    """What became of the inputs; "" where they are as they were."""
    names = [name for name in case.inputs.split() if name not in case.replaces]
    return difference(under(found, names), under(reference.before, names))


def ends_right(case: Case, reference: Reference, before: Tree, again: Ended, found: Tree) -> str:
    """Why a start after a fault did not end as an undisturbed run; "" where it did. before, found: it and after it."""
    said = f"started again, status {again.status} ({last_line(again)})"
    if wrong := difference(found, reference.after):
        return f"{said}: {wrong}"
    left = {path: one for path, one in before.items() if path in reference.after or one not in ("folder", "empty")}
    is_done = left == reference.after  # then it may say that the result is there; an empty work folder says nothing
    bad = again.hangs or "Traceback" in again.err or again.status not in ((0, 2) if is_done else (0,))
    return said if bad else ""


def last_line(ended: Ended) -> str:
    return ended.lines[-1][:300] if ended.lines else "no line"


def phase_of(reference: Reference, number: int) -> tuple[str, int]:
    """The phases take turns: (that of a trial, how many of it were before)."""
    names = list(dict.fromkeys(reference.phases))
    return names[number % len(names)], number // len(names)


def kill(stage: Stage, case: Case, number: int, seed: int) -> Row:
    """One trial: at an event or a while after it; of five trials one goes on with a second kill, or a third."""
    reference = stage.reference(case)
    draw = random.Random(f"{seed} kill {case.name} {number}")
    phase, turn = phase_of(reference, number)
    point = point_of(reference, phase, turn, draw)
    stage.fresh(case)
    ended = stage.start(case, point=point)
    kills, where = 1, in_words(point, reference)
    wanted = draw.randint(2, MOST_KILLS) if turn % 5 == 3 else 1
    found = tree_of(stage.trial)
    wrong = half_written(case, found, reference) or read_only(case, found, reference)
    while not wrong and kills < wanted and ended.status == -signal.SIGKILL:
        point = Point(event=draw.randint(1, max(1, len(reference.events) // 2)), delay=draw.choice((None, 0.01)))
        is_killed = stage.again(case, point=point).status == -signal.SIGKILL
        found = tree_of(stage.trial)
        wrong = half_written(case, found, reference) or read_only(case, found, reference)
        if not is_killed:  # it came to its end before
            break
        kills, where = kills + 1, f"{where}, then at event {point.event}"
    row = {"part": "kill", "case": case.name, "number": number, "phase": phase, "point": where}
    if ended.status != -signal.SIGKILL or not has_written(found, reference.before):
        detail = f"status {ended.status}" if ended.status != -signal.SIGKILL else "no byte was written yet"
        return Row(**row, outcome=NOT_COUNTED, detail=detail)
    wrong = wrong or ends_right(case, reference, found, stage.again(case), tree_of(stage.trial))
    return Row(**row, outcome=FELL if wrong else PASSED, detail=wrong, more={"kills": kills})


def pair(stage: Stage, case: Case, number: int, seed: int) -> Row:
    """Two processes of one command at once; every second time one of them is killed."""
    reference = stage.reference(case)
    draw = random.Random(f"{seed} pair {case.name} {number}")
    stage.fresh(case)
    phase, turn = phase_of(reference, number // 2)
    point = point_of(reference, phase, turn, draw) if number % 2 else None
    other = stage.said.with_name("said-other")
    other.mkdir(exist_ok=True)
    words = case.words.split()
    both = (
        Child(words, stage.trial, stage.said, hooks=stage.hooks, point=point),
        Child(words, stage.trial, other, hooks=stage.hooks),
    )
    ended = [one.end() for one in both]
    found = tree_of(stage.trial)
    wrong = half_written(case, found, reference) or read_only(case, found, reference)
    for one in ended:
        if one.hangs or "Traceback" in one.err or one.status not in (0, 1, 2, -signal.SIGKILL):
            wrong = wrong or f"status {one.status}: {last_line(one)}"
    if not wrong and all(one.status for one in ended):
        wrong = ends_right(case, reference, found, stage.again(case), tree_of(stage.trial))
    elif not wrong:
        # what the killed one left goes when the next one starts, and the other had started before
        mine = {path: one for path, one in found.items() if point is None or not PARTIAL.search(path)}
        left = difference(mine, reference.after)
        wrong = f"statuses {[one.status for one in ended]}: {left}" if left else ""
    return Row(
        part="pair", case=case.name, number=number, phase="one killed" if point else "both to the end",
        point=in_words(point, reference) if point else "two at once", outcome=FELL if wrong else PASSED, detail=wrong,
    )  # fmt: skip
