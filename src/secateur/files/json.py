"""JSON that somebody else wrote, read without trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

MAX_JSON = 500_000_000  # bytes; the largest index there is has about 20 million


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SecateurError: no such file, or something else in it.
    """
    if not path.is_file():
        raise SecateurError(f"{path}: the file is missing")
    if path.stat().st_size > MAX_JSON:
        raise SecateurError(f"{path}: more than {MAX_JSON} bytes, which is no description of a model")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise SecateurError(f"{path}: found {value!r:.60}, expected an object")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise SecateurError("an object lists a name twice")
    return dict(pairs)
