"""The one generator of damaged input: a whole value or file goes in, damaged ones come out, the same ones each time.

Each damage is (place, what, data): where in the whole it is, what was done there, and the damaged text or bytes.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Steps = tuple[str | int, ...]

# What is put in place of each value of a JSON text, by name.
WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "1.5": 1.5,
    "2**63": 2**63,
    "huge": 10**400,
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
# Also in place of each value, where a reader must bound what it builds or prints: a config, an index, a header.
HOSTILE: dict[str, Any] = {
    "0": 0,
    "1": 1,
    "10**4": 10**4,
    "10**6": 10**6,
    "10**9": 10**9,
    "2**40": 2**40,
    "-2**31": -(2**31),
    "1e308": 1e308,
    "empty list": [],
    "empty object": {},
    "list of a number": [10**6],
    "long list": [7] * 10_000,
    "long text": "x" * 100_000,
    "a path out": "../../../../../../etc/passwd",
    "markup": "[red]x[/blue]\n\x1b[31m",
    "zero byte": "a\0b",
}


class Damaged(NamedTuple):
    """One damage, see the module."""

    place: str
    what: str
    data: Any

    @property
    def name(self) -> str:
        return f"{self.place or 'the whole'}: {self.what}"


def places(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """(path, value) of the whole and of every part of it."""
    yield steps, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in parts:
        yield from places(part, (*steps, step))


def in_words(steps: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def replaced(sample: Any, steps: Steps, value: Any) -> Any:
    """`sample` with another value at a place."""
    if not steps:
        return value
    whole = copy.deepcopy(sample)
    inside = whole
    for step in steps[:-1]:
        inside = inside[step]
    inside[steps[-1]] = value
    return whole


def damaged_values(sample: Any, wrong: Mapping[str, Any] = WRONG | ALWAYS_WRONG) -> Iterator[Damaged]:
    """Every part of a JSON value replaced, every key of it missing, and one key too many in every object."""
    for steps, value in places(sample):
        for name, other in wrong.items():
            if other != value or type(other) is not type(value):
                yield Damaged(in_words(steps), name, replaced(sample, steps, other))
        if isinstance(value, dict):
            for key in value:
                rest = {other: part for other, part in value.items() if other != key}
                yield Damaged(in_words((*steps, key)), "missing", replaced(sample, steps, rest))
            yield Damaged(in_words(steps), "unknown key", replaced(sample, steps, {**value, "unheard of": 1}))


def damaged_json(sample: Any, wrong: Mapping[str, Any] = WRONG | ALWAYS_WRONG) -> Iterator[Damaged]:
    """`damaged_values` as text, and `damaged_text`."""
    for damage in damaged_values(sample, wrong):
        yield damage._replace(data=json.dumps(damage.data).encode())
    yield from damaged_text(sample)


def damaged_text(sample: Any) -> Iterator[Damaged]:
    """What can be wrong with a JSON text itself: a key twice in an object, cuts, bytes, nesting."""
    for steps, value in places(sample):
        if isinstance(value, dict):
            twice = json.dumps({**value, "unheard of": 1}).replace('"unheard of"', json.dumps(next(iter(value), "")))
            text = json.dumps(replaced(sample, steps, "HERE")).replace('"HERE"', twice)
            yield Damaged(in_words(steps), "key twice", text.encode())
    whole = json.dumps(sample).encode()
    for end in sorted({0, 1, len(whole) - 1, *(len(whole) * part // 8 for part in range(1, 8))}):
        yield Damaged("", f"cut after {end} bytes", whole[:end])
        yield Damaged("", f"not UTF-8 at byte {end}", whole[:end] + b"\xff" + whole[end:])
    yield Damaged("", "text after it", whole + b"]")
    yield Damaged("", "nested without end", b"[" * 100_000)
    yield Damaged("", "objects without end", b'{"a":' * 100_000)
    yield Damaged("", "a number of 5000 digits", b"1" * 5000)
    yield Damaged("", "UTF-16", json.dumps(sample).encode("utf-16"))


def damaged_bytes(data: bytes, *, seed: int = 0, count: int = 60) -> Iterator[Damaged]:
    """A file of bytes cut, with flipped bits, with a part zeroed, twice or gone: about `count` of them, and 4 more."""
    draw = random.Random(seed)
    yield Damaged("", "empty", b"")
    yield Damaged("", "twice", data * 2)
    yield Damaged("", "all zero", bytes(len(data)))
    yield Damaged("", "a text", b"<!DOCTYPE html>\n<title>404</title>\n")
    ends = {0, 1, 2, 4, 7, 8, 9, 16, len(data) - 1, len(data) - 8, *(len(data) * n // 9 for n in range(1, 9))}
    for end in sorted(end for end in ends if 0 < end < len(data)):
        yield Damaged("", f"cut after {end} bytes", data[:end])
    for number in range(max(0, count - 18) if data else 0):
        # where descriptions are, at the ends, there is more to break than in the middle of numbers
        near = draw.choice((16, 128, 1024, len(data)))
        at = min(draw.randrange(near), len(data) - 1)
        at = len(data) - 1 - at if draw.random() < 0.4 else at
        length = min(draw.choice((1, 2, 4, 8, 64)), len(data) - at)
        kind = number % 5
        if kind < 2:
            flipped = bytes([data[at] ^ 1 << draw.randrange(8)])
            yield Damaged("", f"a bit of byte {at} flipped", data[:at] + flipped + data[at + 1 :])
        elif kind == 2:
            value = draw.choice((b"\0", b"\xff", b"\x7f"))
            yield Damaged("", f"{length} bytes {value!r} at {at}", data[:at] + value * length + data[at + length :])
        elif kind == 3:
            yield Damaged("", f"{length} bytes gone at {at}", data[:at] + data[at + length :])
        else:
            more = data[at : at + length] * 2
            yield Damaged("", f"{length} bytes twice at {at}", data[:at] + more + data[at + length :])


def damaged_safetensors(data: bytes, *, seed: int = 0, count: int = 40) -> Iterator[Damaged]:
    """The header with wrong values and a length that lies, and `damaged_bytes`."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    few, others = dict(list(header.items())[:3]), dict(list(header.items())[3:])
    of_header = [
        damage._replace(
            data=json.dumps(damage.data | others if isinstance(damage.data, dict) else damage.data).encode()
        )
        for damage in damaged_values(few, WRONG | ALWAYS_WRONG | HOSTILE)
    ]
    for place, what, text in (*of_header, *damaged_text(header)):
        yield Damaged(f"header {place}", what, struct.pack("<Q", len(text)) + text + rest)
    for wrong in (0, 1, 7, length - 1, length + 1, len(data), 2**31, 2**32, 2**62, 2**64 - 1):
        yield Damaged("length of the header", str(wrong), struct.pack("<Q", wrong) + data[8:])
    yield from damaged_bytes(data, seed=seed, count=count)


def damaged_zip(data: bytes, *, seed: int = 0, count: int = 40, bomb: int = 300_000_000) -> Iterator[Damaged]:
    """Members of an archive (.npz, and what torch.save writes) damaged, gone, there twice, packed; `damaged_bytes`.

    A packed member that ends with `bomb` zeros is a bomb: 300 MB from 300 kB.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in members.items():
        others = {other: value for other, value in members.items() if other != name}
        yield Damaged(name, "missing", _zip(others))
        yield Damaged(name, "packed", _zip(members, packed=name))
        yield Damaged(name, "renamed", _zip({**others, f"../{name}": content}))
        for damage in damaged_bytes(content, seed=seed, count=20):
            yield Damaged(name, damage.what, _zip({**members, name: damage.data}))
        for what, lie in _lies_of_npy(content):
            yield Damaged(name, what, _zip({**members, name: lie}))
    first = next(iter(members))
    yield Damaged(first, "a bomb", _zip({**members, first: members[first] + bytes(bomb)}, packed=first))
    yield from damaged_bytes(data, seed=seed, count=count)


def _zip(members: Mapping[str, bytes], packed: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED, 1)
    return out.getvalue()


def _lies_of_npy(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A .npy whose header says something else than its data."""
    if not data.startswith(b"\x93NUMPY\x01"):
        return
    (length,) = struct.unpack("<H", data[8:10])
    rest = data[10 + length :]
    for what, header in {
        "a shape of 2**40": "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }",
        "a shape of 10**6 x 10**6": "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }",
        "a shape below 0": "{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 4, 4), }",
        "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "no dictionary": "[1, 2]",
        "a dictionary of code": "{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (1,), }",
        "nested": "(" * 3000,
        "a long type": "{'descr': '|V1099511627776', 'fortran_order': False, 'shape': (1,), }",
    }.items():
        text = header.encode() + b"\n"
        yield what, b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rest


class _Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def hostile_pickles(marker: str) -> Iterator[Damaged]:
    """Pickles that would make the folder `marker`, fill the memory or nest without end, as bare streams."""
    import os

    yield Damaged("", "code", pickle.dumps({"a": _Runs(os.mkdir, marker)}))
    yield Damaged("", "eval", pickle.dumps(_Runs(eval, f"__import__('os').mkdir({marker!r})")))
    yield Damaged("", "a class", pickle.dumps(_Runs(bytearray, 2**33)))
    yield Damaged("", "memo", b"\x80\x02N" + b"r\xff\xff\xff\xff" + b".")
    yield Damaged("", "a long text", b"\x80\x04" + b"\x8d" + struct.pack("<Q", 2**40) + b"x.")
    yield Damaged("", "long bytes", b"\x80\x04" + b"\x8e" + struct.pack("<Q", 2**40) + b"x.")
    yield Damaged("", "nested", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield Damaged("", "marks", b"\x80\x02" + b"(" * 1_000_000 + b".")
    yield Damaged("", "a frame", b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.")
    yield Damaged(
        "", "a number of a million digits", b"\x80\x02\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b"."
    )
    yield Damaged("", "nothing on the stack", b"\x80\x02.")
    yield Damaged("", "another value", pickle.dumps([1, "x", {"a": None}]))


def damaged_file(name: str, data: bytes, *, seed: int = 0) -> Iterator[Damaged]:
    """Whatever can be damaged in a file, by its name's ending."""
    if name.endswith(".safetensors"):
        return damaged_safetensors(data, seed=seed)
    if name.endswith(".json"):
        return damaged_json(json.loads(data), WRONG | ALWAYS_WRONG | HOSTILE)
    if data.startswith(b"PK\3\4"):
        return damaged_zip(data, seed=seed)
    return damaged_bytes(data, seed=seed)
