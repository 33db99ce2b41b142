"""`secateur place`: what it reads, what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import cli
from secateur.commands.place import place as command
from secateur.commands.place import read_loads, sglang_location
from secateur.errors import SecateurError
from secateur.placement import METHODS, place, rank_loads
from secateur.plans import Plan
from secateur.stats import RouterStats

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
    ("loads", "num_layers", "message"),
    [
        ({1: WORKED}, None, r"no loads for layers \[0\]"),
        ({0: WORKED, 3: WORKED}, 3, "loads for layer 3, but --num-layers is 3"),
        ({0: WORKED, 1: WORKED[:4]}, None, r"layers have \[4, 8\] experts"),
    ],
)
def test_what_sglang_cannot_hold_is_refused(loads: dict[int, list[int]], num_layers: int | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        sglang_location({layer: place(one, 2) for layer, one in loads.items()}, num_layers)


def test_loads_are_read_from_every_file_that_has_them(tmp_path: Path) -> None:
    stats = RouterStats.from_loads(LOADS, num_tokens=400)
    stats.save(tmp_path / "stats.safetensors")
    window = {"step": 20, "tokens": 10, "layers": LOADS}
    old = {"step": 10, "tokens": 5, "layers": {0: [1]}}
    contents = {
        "loads.json": json.dumps(LOADS),
        "stats.json": json.dumps(stats.to_json()),
        "window.json": json.dumps(window),
        "loads.jsonl": f"{json.dumps(old)}\n{json.dumps(window)}\n",
        "killed.jsonl": f'{json.dumps(window)}\n{{"step": 30, "tok',
    }
    for name, content in contents.items():
        assert read_loads(Path(written(tmp_path, content, name))) == LOADS, name
    assert read_loads(tmp_path / "stats.safetensors") == LOADS


def test_layers_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    assert list(read_loads(Path(written(tmp_path, {"10": [1], "9": [1]})))) == [9, 10]


BAD = {
    "": "not JSON in UTF-8",
    "[1, 2]": "expected an object with a list of loads",
    "{}": "expected an object with a list of loads",
    '{"layers": 3}': "found 3, expected an object",
    '{"a": [1]}': "layer id is 'a', expected a whole number",
    '{"01": [1]}': "layer id is '01'",
    '{"0": 3}': "layer 0: found 3, expected a list of numbers",
    '{"0": [1, true]}': "layer 0: found .*expected a list of numbers",
    '{"0": [1, "2"]}': "layer 0: found .*expected a list of numbers",
    '{"0": [1], "0": [2]}': "lists a key twice",
    '{"0": [NaN]}': "found NaN, which is not JSON",
    '{"0": [Infinity]}': "found Infinity, which is not JSON",
    '{"format": "secateur-plan", "version": 1, "layers": {}}': "expected",
}


@pytest.mark.parametrize("content", BAD)
def test_what_is_no_loads_file_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(SecateurError, match=rf"(?s)loads\.json: .*{BAD[content]}"):
        read_loads(Path(written(tmp_path, content)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"none\.json: cannot be read \(No such file"):
        read_loads(tmp_path / "none.json")
    with pytest.raises(SecateurError, match=r"loads\.jsonl: no line in it"):
        read_loads(Path(written(tmp_path, "", "loads.jsonl")))
    (tmp_path / "latin.json").write_bytes(b'{"0": ["\xe9"]}')
    with pytest.raises(SecateurError, match=r"latin\.json: not JSON in UTF-8"):
        read_loads(tmp_path / "latin.json")
    with pytest.raises(SecateurError, match=r"deep\.json: not JSON"):
        read_loads(Path(written(tmp_path, "[" * 100000, "deep.json")))


class RefusedError(Exception):
    """A file was refused with an error that names it."""


@contextlib.contextmanager
def refusals_of(path: Path) -> Iterator[None]:
    try:
        yield
    except SecateurError as error:
        raise (RefusedError if str(error).startswith(f"{path}: ") else AssertionError)(str(error)) from error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("0123") | st.text(max_size=4), inner),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(json_values | st.dictionaries(st.sampled_from(["0", "1", "layers", "format"]), json_values))
def test_anything_else_gives_loads_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with contextlib.suppress(RefusedError), refusals_of(path):
        for layer, loads in read_loads(path).items():
            assert isinstance(layer, int)
            assert all(type(load) in (int, float) for load in loads)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_give_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    for name in ("fuzz.json", "fuzz.jsonl", "fuzz.safetensors"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        with pytest.raises(SecateurError, match=name):
            read_loads(path)


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
    assert status(monkeypatch, written(tmp_path), "--ranks", "2", "--out", str(tmp_path / "none" / "out.json")) == 1


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
    import os

    import secateur.placement

    def chatty(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"from below")
        return place(*arguments, **options)

    monkeypatch.setattr(secateur.placement, "place", chatty)
    assert status(monkeypatch, written(tmp_path), "--ranks", "2", "--json") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["layers"]
    assert "from below" in captured.err
