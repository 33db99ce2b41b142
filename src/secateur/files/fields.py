"""Take typed values out of JSON that somebody else wrote; every error names file, place, key and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import SecateurError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """One JSON object and the place it came from, such as "metrics.jsonl:12"."""

    where: str
    data: dict[str, Any]

    def require(self, key: str) -> Any:
        """The value under `key`, whatever it is."""
        if key not in self.data:
            raise SecateurError(f"{self.where}: '{key}' is missing, found {sorted(self.data)}")
        return self.data[key]

    def error(self, key: str, expected: str) -> SecateurError:
        """The error to raise when the value under `key` is not what was expected."""
        return SecateurError(f"{self.where}: '{key}' is {self.data.get(key)!r:.80}, expected {expected}")

    def integer(self, key: str) -> int:
        """A whole number of at least 0."""
        value = self.require(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "a whole number of at least 0")
        return value

    def number(self, key: str) -> float | None:
        """A finite number; None for a missing key, null, and a value that is not finite (a run that diverged)."""
        value = self.data.get(key)
        if value is None or value in ("inf", "-inf", "nan"):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number or null")
        return float(value) if math.isfinite(value) else None

    def numbers(self, key: str) -> dict[str, float | None]:
        """An object of numbers; empty for a missing key."""
        part = self.part(key) if self.data.get(key) is not None else Fields(where=self.where, data={})
        return {name: part.number(name) for name in part.data}

    def text(self, key: str, allowed: Collection[str] = ()) -> str:
        """A text, one of `allowed` if any are given."""
        value = self.require(key)
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise self.error(key, f"one of {sorted(allowed)}" if allowed else "a text")
        return value

    def part(self, key: str) -> Fields:
        """The object under `key`."""
        if not isinstance(self.require(key), dict):
            raise self.error(key, "an object")
        return Fields(where=f"{self.where} {key}", data=self.data[key])

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0."""
        values = self.require(key)
        if not isinstance(values, list) or any(
            isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in values
        ):
            raise self.error(key, "a list of whole numbers of at least 0")
        return tuple(values)

    def by_layer(self, key: str, take: Callable[[Fields, str], T]) -> dict[int, T]:
        """An object with layer ids as keys, ascending; `take(fields, name)` reads each entry."""
        part = self.part(key)
        if not all(name.isdecimal() for name in part.data):
            raise self.error(key, "an object with layer ids as keys")
        return {int(name): take(part, name) for name in sorted(part.data, key=int)}


def read_json(path: Path) -> Any:
    """The content of a whole JSON file.

    Raises:
        SecateurError: the file cannot be read, or is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SecateurError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"{path}: not JSON in UTF-8 ({error})") from error


def read_object(path: Path) -> Fields:
    """A JSON file that holds one object. Raises as `read_json`."""
    return as_fields(read_json(path), str(path))


def read_lines(path: Path) -> Iterator[Fields]:
    """The objects of a .jsonl file, one a line.

    A last line without a line end that is not JSON is what a killed writer leaves: it is dropped.

    Raises:
        SecateurError: the file cannot be read, or another line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SecateurError(f"{path}: cannot be read ({error.strerror})") from error
    *complete, tail = content.split(b"\n")
    for number, line in enumerate([*complete, tail], start=1):
        is_tail = number == len(complete) + 1
        if is_tail and not line:
            return
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            if is_tail:
                return
            raise SecateurError(f"{path}:{number}: not JSON ({error})") from error
        yield as_fields(data, f"{path}:{number}")


def as_fields(data: Any, where: str) -> Fields:
    """Raises SecateurError when `data` is not an object."""
    if not isinstance(data, dict):
        raise SecateurError(f"{where}: found {data!r:.80}, expected an object")
    return Fields(where=where, data=data)
