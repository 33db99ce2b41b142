"""When the machine of `make faults` says that a trial passed: what lies there, what was said, what was read."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from faults_campaign import fills, signals
from faults_campaign.cases import Case
from faults_campaign.damages import judged
from faults_campaign.forked import Ended
from faults_campaign.kills import ends_right, half_written
from faults_campaign.readers import Reader
from faults_campaign.stage import Reference
from support.damage import Damaged

WHOLE = Ended(status=0, is_reached=True, events=8, out="", err="", seconds=0.1, processor=0.1, memory=2**20)

BEFORE = {"in": "folder", "in/a": "1"}
AFTER = BEFORE | {"out": "folder", "out/a": "2", "out/b": "3"}
TOY = Case(name="toy", words="toy", inputs="in", results=("out",))
TOYS = Reference(before=BEFORE, after=AFTER, events=(), phases=(), seconds=1.0)


def test_a_result_is_there_as_a_whole_or_not_at_all() -> None:
    assert half_written(TOY, BEFORE, TOYS) == half_written(TOY, AFTER, TOYS) == ""
    assert half_written(TOY, BEFORE | {"out": "folder"}, TOYS) == "out: missing: out/a, out/b"
    assert half_written(TOY, AFTER | {"out/a": "half"}, TOYS) == "out: other content: out/a"
    late, begun = replace(TOY, late=("out/b",)), BEFORE | {"out": "folder", "out/a": "2"}
    assert half_written(late, begun, TOYS) == ""
    under_way = {"out/.b.0123456789abcdef": "3"}
    assert half_written(late, begun | under_way, TOYS) == ""
    assert half_written(TOY, AFTER | under_way, TOYS) == "out: left over: out/.b.0123456789abcdef"
    assert (
        half_written(late, begun | {"out/.c.0123456789abcdef": "3"}, TOYS) == "out: left over: out/.c.0123456789abcdef"
    )


@pytest.mark.parametrize(
    ("found", "status", "err", "wrong"),
    [
        (AFTER, 0, "", ""),
        (AFTER | {".out.left": "folder"}, 0, "", "left over: .out.left"),
        (AFTER, 2, "error: it is there already", "status 2"),
        (AFTER, 0, "Traceback (most recent call last)", "Traceback"),
        (BEFORE, 0, "", "missing: out, out/a, out/b"),
    ],
)
def test_the_next_start_must_end_as_if_nothing_had_been(found: Any, status: int, err: str, wrong: str) -> None:
    said = ends_right(TOY, TOYS, BEFORE, replace(WHOLE, status=status, err=err), found)
    assert wrong in said
    assert bool(said) == bool(wrong)


def test_a_command_that_was_done_may_say_so() -> None:
    told = replace(WHOLE, status=2, err="error: it is there already")
    assert not ends_right(TOY, TOYS, AFTER, told, AFTER)
    emptied = AFTER | {".out.pruning": "folder", ".out.pruning/lock": "empty"}
    assert not ends_right(TOY, TOYS, emptied, told, AFTER)
    assert "status 2" in ends_right(TOY, TOYS, emptied | {".out.pruning/asked.json": "1"}, told, AFTER)


ONE = "interrupted; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("status", "err", "left", "wrong"),
    [
        (143, ONE, {}, ""),
        (-15, ONE, {}, ""),
        (0, "", {}, ""),  # it came too late
        (-15, "", {}, "0 lines"),
        (143, ONE * 2, {}, "2 lines"),
        (1, ONE, {}, "status 1"),
        (143, "Traceback\n", {}, "a traceback"),
        (143, ONE, {".out.0123456789abcdef.partial/x": "1"}, "left over"),
        (143, ONE, {".new.json.0123456789abcdef": "1"}, "left over"),
        (143, ONE, {".out.pruning/asked.json": "1"}, ""),
    ],
)
def test_how_a_command_ends_at_a_signal(status: int, err: str, left: dict[str, str], wrong: str) -> None:
    said = signals.wrong_end(replace(WHOLE, status=status, err=err), signal.SIGTERM, left)
    assert wrong in said
    assert bool(said) == bool(wrong)


@pytest.mark.parametrize(
    ("status", "err", "wrong"),
    [
        (1, "error: [Errno 28] No space left on device: 'out/a.json'\n", ""),
        (1, "error: [Errno 28] No space left on device\n", "no file named"),
        (1, "error: out/a.json: cannot be written\n", "is missing"),
        (2, "error: out/a.json: No space left on device\n", "status 2"),
        (1, "error: out/a.json:\n No space left on device\n", "2 lines"),
        (1, "Traceback\n", "a traceback"),
    ],
)
def test_how_a_command_ends_on_a_full_disk(status: int, err: str, wrong: str) -> None:
    said = fills.wrong_end(replace(WHOLE, status=status, err=err))
    assert wrong in said
    assert bool(said) == bool(wrong)


A, B = {"a.json": "1", "new": "2"}, {"a.json": "1", "new": "other"}
DAMAGED = Damaged("", "cut", b"")


@pytest.mark.parametrize(
    ("changes", "found", "outcome"),
    [
        ({"status": 2, "err": "error: a.json: cut\n"}, {"a.json": "1"}, "refused"),
        ({}, A, "read, same result"),
        ({}, B, "another result"),
        ({"status": 2, "err": "error: cut\n"}, {"a.json": "1"}, "no file named"),
        ({"status": 2, "err": "error: a.json: cut\n\nmore\n"}, {"a.json": "1"}, "several lines"),
        ({"status": 2, "err": "error: a.json: cut\n"}, A, "left a result"),
        ({"status": 1, "err": "error: a.json: cut\n"}, {"a.json": "1"}, "wrong status"),
        ({"status": 1, "err": "Traceback\nValueError: a.json\n"}, {"a.json": "1"}, "uncaught"),
        ({"status": -11}, {"a.json": "1"}, "died"),
        ({"hangs": True}, {"a.json": "1"}, "hang"),
        ({"processor": 5.5, "status": 2, "err": "error: a.json\n"}, {"a.json": "1"}, "hang"),
        ({"memory": 301 * 2**20, "status": 2, "err": "error: a.json\n"}, {"a.json": "1"}, "memory"),
    ],
)
def test_how_a_damaged_file_is_read(changes: dict[str, Any], found: dict[str, str], outcome: str) -> None:
    reader = Reader(words="toy", inputs="a.json", file="a.json", results=("new",))
    assert judged(reader, replace(WHOLE, **changes), found, WHOLE, A, DAMAGED)[0] == outcome
    if outcome == "another result":
        text = replace(reader, is_content=True)
        assert judged(text, replace(WHOLE, **changes), found, WHOLE, A, DAMAGED)[0] == "read, as other content"


@pytest.mark.parametrize(
    ("err", "outcome"),
    [
        ("error: source: norm_sum of expert 2 is nan; its weights are not finite\n", "refused"),
        ("error: source: its header is damaged\n", "no file named"),
        ("error: norm_sum of expert 2 is nan; its weights are not finite\n", "no file named"),
    ],
)
def test_weights_that_compute_no_number_are_named_by_their_folder(err: str, outcome: str) -> None:
    reader = Reader(words="toy", inputs="source", file="source/model.safetensors", results=("new",))
    assert judged(reader, replace(WHOLE, status=2, err=err), {}, WHOLE, A, DAMAGED)[0] == outcome


def test_an_undamaged_file_must_be_read() -> None:
    reader = Reader(words="toy", inputs="a.json", file="a.json", results=("new",))
    assert judged(reader, WHOLE, A, WHOLE, A, None)[0] == "undamaged, read"
    refused = replace(WHOLE, status=2, err="error: a.json: cut\n")
    assert judged(reader, refused, {"a.json": "1"}, WHOLE, A, None)[0] == "undamaged, not read"
