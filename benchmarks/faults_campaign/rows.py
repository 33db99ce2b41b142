"""What a campaign has found so far, one line a trial, so that the next start goes on after the last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FELL, NOT_COUNTED = "passed", "fell", "not counted"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial. case and number say it again, with the seed. detail: where it was, and what fell."""

    part: str
    case: str
    number: int
    phase: str
    outcome: str
    detail: str = ""
    point: str = ""
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.part}/{self.case}/{self.number}"


class Rows:
    """The rows of one source and seed, in a file of lines."""

    def __init__(self, path: Path, source: str, seed: int) -> None:
        self._path, self._about = path, {"source": source, "seed": seed}
        self.rows: list[Row] = list(self._read())

    def _read(self) -> Iterator[Row]:
        if not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # a killed campaign
            if {key: value.pop(key) for key in self._about} == self._about:
                yield Row(**value)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(row) | self._about) + "\n")

    def of(self, part: str, case: str | None = None) -> list[Row]:
        return [row for row in self.rows if row.part == part and case in (None, row.case)]

    def counted(self, part: str, case: str, phase: str | None = None) -> int:
        return sum(row.outcome != NOT_COUNTED and phase in (None, row.phase) for row in self.of(part, case))
