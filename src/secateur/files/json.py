"""The one reader of JSON: text that somebody else wrote goes in, plain values or one SecateurError come out."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.limits import MAX_DEPTH, MAX_JSON, SHOWN
from secateur.files.opened import opened

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character; two make a whole one
TOO_LARGE = f"more than {MAX_JSON} bytes, which is no record and no description of a model"
TOO_DEEP = f"not JSON that can be read (more than {MAX_DEPTH} objects and lists in each other)"


def parse_json(data: bytes | str, where: str, *, constants: bool = True) -> Any:
    """The value that a JSON text holds.

    Args:
        where: the name of the text in messages, such as its file.
        constants: whether NaN and Infinity are read, which JSON does not have but Python writes.

    Raises:
        SecateurError: not JSON in UTF-8, a key twice in an object, or too deep; the message begins with `where`.
    """
    if len(data) > MAX_JSON:
        raise SecateurError(f"{where}: {TOO_LARGE}")
    try:
        text = (data.encode("utf-8") if isinstance(data, str) else data).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=None if constants else _refuse_constant)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        _check_depth(value)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error
    except RecursionError as error:
        raise SecateurError(f"{where}: {TOO_DEEP}") from error
    except ValueError as error:
        raise SecateurError(f"{where}: not JSON in UTF-8 ({error})") from error
    return value


def read_json(path: Path, *, where: str | None = None, constants: bool = True) -> Any:
    """The value that a JSON file holds.

    Args:
        where: the name of the file in messages; its path where nothing is given.
        constants: see `parse_json`.

    Raises:
        SecateurError: the file is missing, cannot be read, is too large, or as `parse_json`.
    """
    where = str(path) if where is None else where
    try:
        with opened(path, where=where, pipes=True) as file:
            if os.fstat(file.fileno()).st_size > MAX_JSON:
                raise SecateurError(f"{where}: {TOO_LARGE}")
            data = file.read(MAX_JSON + 1)  # a pipe has no size
    except OSError as error:
        raise SecateurError(f"{where}: cannot be read ({error.strerror})") from error
    return parse_json(data, where, constants=constants)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises as `read_json`, and when the file holds another value."""
    if not path.exists() and not path.is_symlink():
        raise SecateurError(f"{path}: the file is missing")
    value = read_json(path)
    if not isinstance(value, dict):
        raise SecateurError(f"{path}: found {value!r:.{SHOWN}}, expected an object")
    return value


def read_lines(path: Path, *, until_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """The (name, value) of each line of a .jsonl file, the name being "FILE:LINE" for messages.

    A last line without a line end that is not JSON is what a killed writer leaves: it is dropped.

    Args:
        until_cut: end without an error at any line that is not JSON, as a writer leaves it that goes on after a kill.

    Raises:
        SecateurError: the file cannot be read, or as `parse_json` for another line.
    """
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_JSON + 1), b""), start=1):
                try:
                    value = parse_json(line, f"{path}:{number}")
                except SecateurError:
                    if not until_cut and (line.endswith(b"\n") or len(line) > MAX_JSON):
                        raise
                    return
                yield f"{path}:{number}", value
    except OSError as error:
        raise SecateurError(f"{path}: cannot be read ({error.strerror})") from error


def _check_depth(value: Any) -> None:
    """So that nothing which walks the value later runs into Python's limit."""
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise SecateurError(TOO_DEEP)
        inner = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in inner if isinstance(part, dict | list)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise SecateurError(f"an object lists a key twice: {twice!r:.{SHOWN}}")
    if "-0" in entry and "0" in entry:  # the same key where keys are whole numbers
        raise SecateurError("an object lists a key twice: '0' and '-0'")
    return entry


def _refuse_constant(name: str) -> None:
    raise SecateurError(f"found {name}, which is not JSON")
