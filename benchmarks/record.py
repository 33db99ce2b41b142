"""What every benchmark here does with its result: print one table, store one JSON with versions, hardware, command.

It goes to ./benchmark-results, and what docs show stays as it is; with --store it takes the place of what docs show.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur.environment import hardware, versions

RESULTS = Path(__file__).parent / "results"  # what docs show
DOCS = Path(__file__).parents[1] / "docs"
OWN = Path("benchmark-results")  # in the current folder: a run's own


def parser_for(about: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `about` is the script's docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--store", action="store_true", help=f"write where docs show it from; otherwise into ./{OWN} (figures too)"
    )
    return made


def results_in(stored: bool) -> Path:
    """The folder of the JSON files of all benchmarks."""
    return _made(RESULTS if stored else OWN)


def docs_in(stored: bool, part: str) -> Path:
    """The folder of figures and pages: a `part` of docs, or the run's own of the same name."""
    return _made((DOCS if stored else OWN) / part)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def store(name: str, result: dict[str, Any], *, stored: bool) -> Path:
    """Write NAME.json."""
    path = results_in(stored) / f"{name}.json"
    about = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["python", f"benchmarks/{Path(sys.argv[0]).name}", *told(sys.argv[1:])],
        "versions": versions(),
        "hardware": hardware(),
    }
    path.write_text(json.dumps(about | result, indent=1, allow_nan=False) + "\n")
    return path


def told(words: list[str]) -> list[str]:
    """Where somebody keeps files says nothing about the result."""
    return [Path(word).name if word.startswith("/") else word for word in words if word != "--store"]


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
