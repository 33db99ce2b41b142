"""However a record is damaged, reading it is a SecateurError that names the file, and never anything else.

A new record is one row of RECORDS: a whole sample, what reads it, and what may be damaged without being wrong.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.plans import Plan

# What is put in place of each value of a record, by name.
WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "1.5": 1.5,
    "2**63": 2**63,
    "huge": 10**4000,
    "nan": math.nan,
    "infinity": math.inf,
    "text": "x",
    "empty text": "",
    "list": [[]],
    "object": {"x": []},
}
ALWAYS_WRONG: dict[str, Any] = {
    "half a character": "\ud800",
    "deep": functools.reduce(lambda inner, _: [inner], range(150), 1),
}
ANYTHING = frozenset({*WRONG, "missing", "unknown key"})
TEXTS = frozenset({"text", "empty text"})
NUMBERS = frozenset({"-1", "1.5", "2**63"})
NOT_FINITE = frozenset({"nan", "infinity"})
OPTIONAL = frozenset({"null", "missing"})
MORE_KEYS = frozenset({"unknown key"})

Steps = tuple[str | int, ...]


def write_over(path: Path, data: bytes) -> None:
    """As `Path.write_bytes`, in a file that is kept: emptying one first takes a hundred times as long."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One kind of record.

    Args:
        sample: a whole one, small, with every key that there is.
        read: reads it, given the path of the file.
        accepts: damage that is none: {path as in messages, "" being the whole: names of WRONG, "missing", "unknown
            key"}; a path that ends with "." stands for all beneath it.
        write: puts the damaged text where `read` finds it; as the file itself if nothing is given.
        is_line: the file is of lines, and the record is one.
    """

    file: str
    sample: Any
    read: Callable[[Path], object]
    accepts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    write: Callable[[Path, bytes], object] = write_over
    is_line: bool = False

    def is_accepted(self, path: str, name: str) -> bool:
        beneath = any(key.endswith(".") and path.startswith(key) and name in self.accepts[key] for key in self.accepts)
        return beneath or name in self.accepts.get(path, ())


PLAN = {
    "format": "secateur-plan",
    "version": 1,
    "criterion": "x",
    "details": {"rule": {"alpha": 0.4}},
    "stats_digest": "ab",
    "removed": "reroute",
    "layers": {"0": {"experts_before": 4, "order": [1, 0]}, "3": {"experts_before": 2, "order": [0]}},
}

RECORDS = {
    "plan": Record(
        file="plan.json",
        sample=PLAN,
        read=Plan.load,
        accepts={
            "criterion": frozenset({"text"}),
            "details": frozenset({"missing", "object", "unknown key"}),
            "details.": ANYTHING - NOT_FINITE,
            "stats_digest": TEXTS | OPTIONAL,
            "removed": OPTIONAL,
            "layers.0": frozenset({"missing"}),
            "layers.3": frozenset({"missing"}),
        },
    ),
}


def places(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """All values in a JSON value with the steps to them, itself first."""
    yield steps, value
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for step, part in parts:
        yield from places(part, (*steps, step))


def in_words(steps: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def replaced(sample: Any, steps: Steps, value: Any) -> bytes:
    """The text of `sample` with another value at `steps`."""
    whole = [copy.deepcopy(sample)]
    parent: Any = whole
    for step in (0, *steps)[:-1]:
        parent = parent[step]
    parent[(0, *steps)[-1]] = value
    return json.dumps(whole[0]).encode()


def damages(sample: Any) -> Iterator[tuple[str, str, bytes]]:
    """(path, name of the damage, the damaged text)."""
    for steps, value in places(sample):
        for name, wrong in {**WRONG, **ALWAYS_WRONG}.items():
            if wrong != value:
                yield in_words(steps), name, replaced(sample, steps, wrong)
        if isinstance(value, dict):
            for key in value:
                rest = {other: part for other, part in value.items() if other != key}
                yield in_words((*steps, key)), "missing", replaced(sample, steps, rest)
            yield in_words(steps), "unknown key", replaced(sample, steps, {**value, "unheard of": 1})
            twice = json.dumps({**value, "unheard of": 1}).replace('"unheard of"', json.dumps(next(iter(value), "")))
            yield in_words(steps), "key twice", replaced(sample, steps, "HERE").replace(b'"HERE"', twice.encode())
    text = json.dumps(sample).encode()
    for end in sorted({0, 1, len(text) - 1, *(len(text) * part // 8 for part in range(1, 8))}):
        yield "", f"cut after {end} bytes", text[:end]
        yield "", f"not UTF-8 at byte {end}", text[:end] + b"\xff" + text[end:]
    yield "", "text after it", text + b"]"
    yield "", "nested without end", b"[" * 100_000
    yield "", "a number of 5000 digits", b"1" * 5000
    yield "", "UTF-16", json.dumps(sample).encode("utf-16")


@pytest.mark.parametrize("name", RECORDS)
def test_a_whole_record_is_read(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    record.write(tmp_path / record.file, json.dumps(record.sample).encode() + b"\n" * record.is_line)
    record.read(tmp_path / record.file)


@pytest.mark.parametrize("name", RECORDS)
def test_every_damage_is_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    path = tmp_path / record.file
    wrong = []
    for place, damage, text in damages(record.sample):
        record.write(path, text + b"\n" * record.is_line)
        try:
            record.read(path)
        except SecateurError as error:
            if record.file not in str(error) or "\n" in str(error) or len(str(error)) > 2000:
                wrong.append((place, damage, f"the message is {error!r:.200}"))
        except Exception as error:
            wrong.append((place, damage, f"ends in {error!r:.200}"))
        else:
            if not record.is_accepted(place, damage):
                wrong.append((place, damage, "is read"))
    assert not wrong


@pytest.mark.parametrize("name", RECORDS)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=re.escape(RECORDS[name].file)):
        RECORDS[name].read(tmp_path / RECORDS[name].file)
