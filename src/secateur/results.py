"""What a public function gives back: a value with typed fields, its command's JSON, a table in a notebook."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

LONGEST = 200  # characters of a cell


@dataclass(frozen=True, kw_only=True)
class Result:
    """The base of all results. A result adds typed fields for what people use next.

    Args:
        content: what the command of the same name prints with `--json`; JSON values only.
    """

    content: Mapping[str, Any] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What the command of the same name prints with `--json`, as a copy that may be changed."""
        return copy.deepcopy(dict(self.content))

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        """Head and rows of the table that a notebook shows: each field, unless a result has something better."""
        shown = [one.name for one in fields(self) if one.name != "content"]
        return ("", "value"), [(name.replace("_", " "), getattr(self, name)) for name in shown]

    def _repr_html_(self) -> str:
        head, rows = self.table()
        top = "".join(f"<th>{_cell(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


@dataclass(frozen=True, kw_only=True)
class Written(Result):
    """A result that left a file or a folder. It may be given wherever a path is expected.

    Args:
        out: the file or folder.
    """

    out: Path

    def __fspath__(self) -> str:
        return os.fspath(self.out)


def _cell(value: object) -> str:
    """Text that cannot become markup; of what is long, the beginning."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {one}" for key, one in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
