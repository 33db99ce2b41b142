"""`secateur place`: what it reads, what it writes, and what it refuses."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur import cli
from secateur.commands.place import place as command
from secateur.placement import METHODS, milp, place, rank_loads
from secateur.plans import Plan

WORKED = [100, 90, 60, 50, 40, 30, 20, 10]
LOADS = {0: WORKED, 1: [5, 5, 5, 5, 5, 5, 5, 6]}


def written(tmp_path: Path, content: object = LOADS, name: str = "loads.json") -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["secateur", "place", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def test_the_new_order_of_every_layer_with_its_balance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "placement.json"
    assert status(monkeypatch, written(tmp_path), "--ranks", "4", "--json", "--out", str(out)) == 0
    result = json.loads(capfd.readouterr().out)
    assert result == json.loads(out.read_text())
    assert (result["format"], result["version"]) == ("secateur-placement", 1)
    expected = {"ranks": 4, "method": "swaps", "groups": 1, "nodes": 1, "tolerance": None}
    assert result["settings"] == expected
    assert result["layers"]["0"] == {
        "order": [0, 7, 2, 5, 3, 4, 1, 6],
        "rank_loads": [110, 90, 90, 110],
        "balance_before": 1.9,
        "balance_after": 1.1,
        "balance_bound": 1.1,
        "moved": 4,
    }
    assert result["layers"]["1"]["moved"] == 0
    assert set(result["layers"]) == {"0", "1"}


def test_the_table_for_people(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, written(tmp_path), "--ranks", "4") == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.replace("│", " ").split() == ["0", "8", "1.900", "1.100", "1.100", "4"] for line in lines)
    assert lines[-1] == "mean of the layers: 1.487 -> 1.087; 4 of 16 experts change their rank"
    assert status(monkeypatch, written(tmp_path), "--ranks", "4", "--quiet") == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("groups", "nodes", "few"), [(2, 1, 0.0), (1, 2, 0.02)])
def test_every_option_reaches_place(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    groups: int,
    nodes: int,
    few: float,
) -> None:
    loads = {0: [77, 95, 27, 21, 79, 83, 51, 15, 83, 51, 16, 14, 41, 69, 40, 84]}
    words = ["--ranks", "4", "--method", "greedy", "--groups", str(groups), "--nodes", str(nodes)]
    assert status(monkeypatch, written(tmp_path, loads), *words, "--few-moves", str(few), "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result["settings"] == {"ranks": 4, "method": "greedy", "groups": groups, "nodes": nodes, "tolerance": few}
    chosen = {"method": "greedy", "num_groups": groups, "num_nodes": nodes, "tolerance": few}
    found = place(loads[0], 4, **chosen)  # type: ignore[arg-type]
    assert result["layers"]["0"]["order"] == list(found.order)
    for option, without in {"method": "swaps", "num_groups": 1, "num_nodes": 1, "tolerance": None}.items():
        if chosen[option] != without:
            other = place(loads[0], 4, **{**chosen, option: without})  # type: ignore[arg-type]
            assert other.order != found.order, f"{option} makes no difference here: choose other loads"


def test_the_plan_re_orders_the_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert status(monkeypatch, written(tmp_path), "--ranks", "2", "--plan", str(path), "--quiet") == 0
    plan = Plan.load(path)
    assert plan.criterion == "placement"
    assert {layer: one.order for layer, one in plan.layers.items()} == {
        layer: place(loads, 2).order for layer, loads in LOADS.items()
    }
    assert rank_loads(WORKED, plan.layers[0].order, 2) == [200, 200]
    assert not any(one.dropped for one in plan.layers.values())


def test_sglang_gets_a_row_for_every_layer_of_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "location.json"
    loads = written(tmp_path, {1: WORKED, 3: WORKED})
    words = ["--ranks", "4", "--quiet", "--sglang", str(path)]
    assert status(monkeypatch, loads, *words) == 2
    assert not path.exists()
    assert status(monkeypatch, loads, *words, "--num-layers", "5") == 0
    moved, ascending = [0, 7, 2, 5, 3, 4, 1, 6], list(range(8))
    rows = [ascending, moved, ascending, moved, ascending]
    assert json.loads(path.read_text()) == {"physical_to_logical_map": rows}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3"], "layer 0: 8 experts do not divide over 3 ranks"),
        (["--ranks", "2", "--method", "best"], "method is 'best', expected one of swaps, greedy, exact"),
        (["--ranks", "4", "--groups", "3"], "3 router groups"),
        (["--ranks", "2", "--few-moves", "inf"], "tolerance is inf"),
        (["--ranks", "2", "--num-layers", "2"], "needs --sglang"),
    ],
)
def test_bad_input_ends_with_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    out = tmp_path / "out.json"
    assert status(monkeypatch, written(tmp_path), *words, "--out", str(out)) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    assert not out.exists()


def test_a_refused_write_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("secateur.placement.every_layer.atomic_write", refuse)
    assert status(monkeypatch, written(tmp_path), "--ranks", "2", "--out", str(tmp_path / "out.json")) == 1


@pytest.mark.parametrize("option", ["--out", "--plan", "--sglang"])
def test_nothing_that_is_there_is_written_over_without_force(
    option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loads, there = written(tmp_path), tmp_path / "there.json"
    there.write_text("mine")
    assert status(monkeypatch, loads, "--ranks", "2", option, str(there)) == 2
    assert f"{option} {there}: it is there already; --force" in capfd.readouterr().err
    assert status(monkeypatch, loads, "--ranks", "2", option, loads, "--force") == 2
    assert "which is only read" in capfd.readouterr().err
    assert there.read_text() == "mine"
    assert status(monkeypatch, loads, "--ranks", "2", option, str(there), "--force") == 0
    written_once = there.read_bytes()
    assert status(monkeypatch, loads, "--ranks", "2", option, str(there)) == 0  # a killed run wrote the same
    assert there.read_bytes() == written_once


def test_two_outputs_are_not_written_to_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = str(tmp_path / "one.json")
    assert status(monkeypatch, written(tmp_path), "--ranks", "2", "--out", one, "--plan", one) == 2
    assert "--out writes to the same file" in capfd.readouterr().err


@pytest.mark.process
def test_the_help_names_every_method_and_shows_an_example() -> None:
    help_of_method = inspect.signature(command).parameters["method"].annotation
    assert all(name in str(help_of_method) for name in METHODS)
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "place", "--help"], capture_output=True, text=True, check=True
    )
    assert "Example: secateur place" in done.stdout


def test_what_a_solver_prints_does_not_reach_standard_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    solve = milp.milp

    def chatty(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"from below")
        return solve(*arguments, **options)

    monkeypatch.setattr(milp, "milp", chatty)
    loads = written(tmp_path, {0: [9, 9, 8, 7, 6, 5, 5, 4, 4, 3, 2, 2]})
    assert status(monkeypatch, loads, "--ranks", "3", "--method", "exact", "--json") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["layers"]
    assert "from below" in captured.err
    os.write(1, b"later")
    assert capfd.readouterr() == ("later", "")
