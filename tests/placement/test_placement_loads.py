"""Loads are read from every file that has them, anything else is one clear error; and SGLang's table of placements."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.placement import place
from secateur.placement.loads import read_loads
from secateur.placement.sglang import sglang_location
from secateur.stats import RouterStats

WORKED = [100, 90, 60, 50, 40, 30, 20, 10]
LOADS = {0: WORKED, 1: [5, 5, 5, 5, 5, 5, 5, 6]}


def written(tmp_path: Path, content: object = LOADS, name: str = "loads.json") -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


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
    '{"a": [1]}': "found the key 'a', expected a layer id, a whole number",
    '{"01": [1]}': "found the key '01', expected a layer id",
    '{"0": 3}': "'0' is 3, expected a list of numbers, one for each expert",
    '{"0": [1, true]}': r"'0\[1\]' is True, expected a whole number",
    '{"0": [1, "2"]}': r"'0\[1\]' is '2', expected a whole number",
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
