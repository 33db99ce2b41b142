"""The evidence pages say what was stored, and every claim of the README points to a row that is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from laep_evidence import read, tables
from laep_grid import SCALES, grid

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = (EVIDENCE / "small" / "tables.md").read_text(encoding="utf-8")
DIFFERENCE = "difference, same seed"  # the first column of the other table that is quoted
LINK = re.compile(r"(?<!`)\[[^\]]+\]\(([^)\s]+)\)")


def rows(text: str) -> list[dict[str, str]]:
    """Every row of every Markdown table, {column: cell}."""
    found: list[dict[str, str]] = []
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not columns or not cells:
            columns = cells
        elif set(cells[0]) != {"-"}:
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def test_the_tables_are_made_of_what_is_stored() -> None:
    assert tables(*read("small")) == RUNS


def test_every_setting_of_the_grid_has_its_rows_for_three_seeds() -> None:
    evidence, _ = read("small")
    assert {name: [run["seed"] for run in runs] for name, runs in evidence.runs.items()} == {
        one.name: [0, 1, 2] for one in grid(SCALES["small"])
    }


@pytest.mark.parametrize("name", ["README.md", "docs/evidence/README.md", "docs/evidence/where-it-does-not-help.md"])
def test_what_is_quoted_of_a_run_is_its_row(name: str) -> None:
    stored = rows(RUNS)
    quoted = [row for row in rows((ROOT / name).read_text(encoding="utf-8")) if row.keys() & {"run", DIFFERENCE}]
    assert quoted
    for row in quoted:
        assert any(row.items() <= one.items() for one in stored), f"{name}: {row} is not as stored"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_measured_paragraph_of_the_readme_points_to_its_rows() -> None:
    measured = README.split("## Measured")[1].split("\n## ")[0]
    for paragraph in measured.strip().split("\n\n"):
        if re.search(r"\d", paragraph) and not paragraph.startswith("|"):
            assert re.search(r"\]\(docs/(evidence/|benchmarks\.md)", paragraph), paragraph


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_every_setting_has_a_base_a_folder_and_something_to_follow(scale: str) -> None:
    settings = grid(SCALES[scale])
    names = {one.name for one in settings}
    assert len({one.folder(0) for one in settings}) == len(names) == len(settings)
    assert {one.base for one in settings} | {one.after for one in settings if one.after} <= names
