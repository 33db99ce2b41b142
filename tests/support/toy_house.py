"""The house with the additions that CONTRIBUTING.md shows: a copy of the tree, changed by exactly the page's diffs.

A diff of the page has no line numbers, which would be wrong at the next change of a file: what it takes away and what
stands around it is looked for, and must be there once.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("src", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml")


@dataclass(frozen=True, kw_only=True)
class Change:
    """In the file `path`, `before` becomes `after`."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A section "Add ..." of the page: its diffs, the commands that test it, and what a failure looks like."""

    changes: tuple[Change, ...]
    commands: tuple[str, ...]
    failures: tuple[str, ...]


def additions(page: str) -> dict[str, Addition]:
    """{what is added: its section}, for the sections that show a diff."""
    found = {}
    for section in page.split("\n## Add ")[1:]:
        title, _, text = section.partition("\n")
        changes = tuple(change for block in blocks(text, "diff") for change in _changes(block))
        if changes:
            commands = tuple(line for block in blocks(text, "sh") for line in block.splitlines())
            found[title] = Addition(changes=changes, commands=commands, failures=tuple(blocks(text, "text")))
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _changes(diff: str) -> Iterable[Change]:
    """The hunks of a block: "--- PATH", then lines that begin with a blank, a minus or a plus; @@ begins another."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        path, _, hunks = part.partition("\n")
        for hunk in hunks.split("@@\n"):
            lines = [line if line else " " for line in hunk.splitlines()]
            wrong = [line for line in lines if line[0] not in " -+"]
            assert not wrong, f"{path}: {wrong[0]!r} is no line of a diff"
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            yield Change(path=path, before=before, after=after)


def copied_house(target: Path) -> Path:
    """A copy of what the tests need, with what was compiled of it, which holds for files of the same time and size."""
    leave = shutil.ignore_patterns("*.png")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=leave)
        else:
            shutil.copy(source, target / name)
    return target


def apply(change: Change, house: Path) -> None:
    path = house / change.path
    text = path.read_text(encoding="utf-8")
    assert text.count(change.before) == 1, f"{change.path} has {text.count(change.before)} times:\n{change.before}"
    path.write_text(text.replace(change.before, change.after), encoding="utf-8")


def run_commands(house: Path, commands: tuple[str, ...], log: Path) -> None:
    """In a process of its own: Secateur and its tests from `house`, each command as the page has it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("secateur", "support", "conftest")]:
        del sys.modules[name]
    sys.path[:0] = [str(house / "src"), str(house / "tests")]
    os.chdir(house)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    importlib.invalidate_caches()
    for command in commands:
        print(f"$ {command}", flush=True)
        python, module, name, *arguments = shlex.split(command)
        if (python, module, name) == ("python", "-m", "pytest"):
            code = int(pytest.main([*arguments, "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not process"]))
        else:
            raise AssertionError(f"{command!r}: expected python -m pytest")
        print(f"exit {code}", flush=True)
