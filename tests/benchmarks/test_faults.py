"""The machine of `make faults` sees what is wrong, on commands that are broken on purpose; and a few of its trials."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from faults_campaign import fills
from faults_campaign.cases import BY_NAME, CASES
from faults_campaign.damages import Damages, chosen
from faults_campaign.forked import call
from faults_campaign.kills import kill, pair
from faults_campaign.readers import READERS
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row, Rows
from faults_campaign.signals import interrupt
from faults_campaign.stage import Stage
from faults_campaign.tables import COLUMNS, fallen, table_of, totals
from support.flax_files import params, random_arrays, write
from support.small_runs import in_child

CONVERT = BY_NAME["convert-vmoe"]
LOADS = next(reader for reader in READERS if reader.name == "place: loads.json")


# --- a stage of two small commands, in a process that nothing else runs in --------------------------------------------


def staged(work: Path, *hooks: Callable[[], None]) -> Stage:
    stage = Stage(work, hooks)
    (stage.inputs / "published").mkdir(parents=True)
    call(write, stage.inputs / "published" / "vmoe", params(random_arrays()))
    layers = {str(layer): [3 + layer, 9, 1, 4, 8, 2, 7, 5] for layer in range(3)}
    (stage.inputs / "loads.json").write_text(json.dumps(layers))
    return stage


def trials(work: Path) -> None:
    """All trials of this file, in one process: {test: [[outcome, phase, detail], ...]}."""
    healthy, careless = staged(work / "healthy"), staged(work / "careless", in_place)
    readers = Damages(healthy)
    rows = {
        "in place": [kill(careless, CONVERT, number, 0) for number in (0, 2, 4)],
        "kill": [kill(healthy, CONVERT, number, 0) for number in range(4)],
        "pair": [pair(healthy, CONVERT, number, 0) for number in range(2)],
        "signal": [interrupt(healthy, CONVERT, number, 0) for number in range(2)],
        "damage": [readers.trial(LOADS, number) for number in (0, 50, 110, 170)],
    }
    for hook in BROKEN:
        healthy.hooks.append(hook)
        rows[hook.__name__] = [readers.trial(replace(LOADS, is_content=False), 1)]
        healthy.hooks.remove(hook)
    told = {name: [[row.outcome, row.phase, row.detail] for row in found] for name, found in rows.items()}
    (work / "found.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    work = tmp_path_factory.mktemp("faults")
    assert in_child(trials, work, stderr=work / "err") == 0, (work / "err").read_text()
    found: dict[str, list[list[str]]] = json.loads((work / "found.json").read_text())
    return found


# --- broken on purpose: what a child does first -----------------------------------------------------------------------


def in_place() -> None:
    """The result is written under its own name."""
    import secateur.models.vmoe.convert as convert

    @contextlib.contextmanager
    def careless(out: Path) -> Iterator[Path]:
        out.mkdir()
        yield out

    convert.written_beside = careless  # type: ignore[assignment]


def patched(target: Callable[[Path], Any]) -> None:
    import secateur.placement.every_layer as place

    place.read_loads = target  # type: ignore[attr-defined]


def fails() -> None:
    patched(lambda path: {}["x"])


def hangs() -> None:
    def turns(path: Path) -> Any:
        signal.setitimer(signal.ITIMER_PROF, 0.2)  # in place of more than five seconds
        while True:
            pass

    patched(turns)


def takes_memory() -> None:
    held: list[bytes] = []

    def takes(path: Path) -> Any:
        held.append(b"x" * (400 * 2**20))
        raise SystemExit(2)

    patched(takes)


def believes() -> None:
    patched(lambda path: {0: [1.0, 2.0]})


BROKEN = {fails: "uncaught", hangs: "hang", takes_memory: "memory", believes: "another result"}


@pytest.mark.process
def test_a_writer_that_works_in_place_is_seen_by_a_kill(made: dict[str, list[list[str]]]) -> None:
    fell = [detail for outcome, _, detail in made["in place"] if outcome == FELL]
    assert fell
    assert all(detail.startswith("out: ") for detail in fell), made["in place"]


@pytest.mark.process
@pytest.mark.parametrize("hook", BROKEN)
def test_a_reader_that_is_broken_is_seen(hook: Callable[[], None], made: dict[str, list[list[str]]]) -> None:
    assert [row[:2] for row in made[hook.__name__]] == [[FELL, BROKEN[hook]]], made[hook.__name__]


# --- a short part of the campaign -------------------------------------------------------------------------------------


@pytest.mark.process
def test_kills_and_pairs_of_a_command_pass(made: dict[str, list[list[str]]]) -> None:
    found = made["kill"] + made["pair"]
    assert {outcome for outcome, _, _ in found} <= {PASSED, NOT_COUNTED}, found
    assert sum(outcome == PASSED for outcome, _, _ in found) >= 4


@pytest.mark.process
def test_signals_at_a_command_pass(made: dict[str, list[list[str]]]) -> None:
    assert [row[:2] for row in made["signal"]] == [[PASSED, "SIGINT"], [PASSED, "SIGTERM"]], made["signal"]


@pytest.mark.process
def test_damaged_loads_are_refused_or_read(made: dict[str, list[list[str]]]) -> None:
    assert {outcome for outcome, _, _ in made["damage"]} == {PASSED}, made["damage"]
    assert {phase for _, phase, _ in made["damage"]} >= {"undamaged, read", "refused"}


# --- numbers, names and the table -------------------------------------------------------------------------------------


def test_every_reader_has_three_hundred_different_damages() -> None:
    text = json.dumps({"a": [1, 2], "b": "x"}).encode()
    made = chosen("a.json", text, 300)
    assert len({one.data for one in made} - {text}) == len(made) == 300
    assert made == chosen("a.json", text, 300)


def test_a_campaign_goes_on_where_it_was_and_knows_other_sources(tmp_path: Path) -> None:
    row = Row(part="kill", case="plan", number=2, phase="write", outcome=PASSED)
    rows = Rows(tmp_path / "rows.jsonl", "this source", 0)
    rows.add(row)
    rows.add(replace(row, number=3, outcome=FELL, detail="left over: x"))
    rows.add(replace(row, number=4, outcome=NOT_COUNTED))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"cut')
    again = Rows(tmp_path / "rows.jsonl", "this source", 0)
    assert again.rows == rows.rows
    assert again.counted("kill", "plan", "write") == 2
    assert (
        Rows(tmp_path / "rows.jsonl", "another", 0).rows == Rows(tmp_path / "rows.jsonl", "this source", 1).rows == []
    )
    assert [one["trial"] for one in fallen(again)] == ["kill/plan/3"]
    assert all(len(line) == len(COLUMNS) for line in table_of(again))
    assert table_of(again)[0] == ["kill", "plan", "2", "1", "1", "write 2"]
    assert totals(again)["kill"]["fell"] == 1


def test_cases_and_readers_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({reader.name for reader in READERS}) == len(READERS)
    assert {case.command for case in CASES} == {
        "observe", "plan", "apply", "prune", "finetune", "pretrain", "place", "report", "convert-vmoe"
    }  # fmt: skip


def test_without_the_right_to_mount_full_disks_are_skipped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from faults_campaign.campaign import Campaign, Goal

    monkeypatch.setattr(fills, "may_mount", lambda: False)
    campaign = Campaign(Stage(tmp_path), Rows(tmp_path / "rows", "x", 0), 0)
    campaign.run([Goal(part="fill", number=200)], None)
    assert "fill: skipped" in capsys.readouterr().out
    assert "fill" in campaign.skipped
