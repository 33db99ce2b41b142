"""What every benchmark here does with its result: print one table, store one JSON with versions, hardware, command."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur.environment import hardware, versions

RESULTS = Path(__file__).parent / "results"


def store(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    about = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])],
        "versions": versions(),
        "hardware": hardware(),
    }
    path.write_text(json.dumps(about | result, indent=1, allow_nan=False) + "\n")
    return path


def _without_folders(argument: str) -> str:
    """Where somebody keeps files says nothing about the result."""
    return Path(argument).name if argument.startswith("/") else argument


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
