"""The evidence pages say what was stored, and what the README and other pages quote of it is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from laep_evidence import read, tables
from laep_grid import SCALES, SMALL, grid

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = (EVIDENCE / "small" / "tables.md").read_text(encoding="utf-8")
DIFFERENCE = "difference, same seed"  # the first column of the other table that is quoted
CLAIMS = "in the README's *Measured*"  # the first column of the list of claims, which quotes no row
# What the stored runs gave the detector of their release, which has other constants now.
OLD_DETECTOR = ("--min-rank-correlation", "0.9", "--max-total-variation", "0.1", "--min-stable-layers", "0.75")
LINK = re.compile(r"(?<!`)\[[^\]]+\]\(([^)\s]+)\)")


def _without(words: tuple[str, ...], options: list[str]) -> list[str]:
    """Options without these words, where they stand in a row."""
    found = [start for start in range(len(options)) if tuple(options[start : start + len(words)]) == words]
    return options[: found[0]] + options[found[0] + len(words) :] if found else options


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


def test_every_setting_has_finished_runs_of_three_seeds_and_a_timing() -> None:
    evidence, _ = read("small")
    settings = {one.name: one for one in grid(SCALES["small"])}
    seeds = {name: [run["seed"] for run in runs] for name, runs in evidence.runs.items()}
    assert seeds == {name: [0, 1, 2] for name in settings}
    for name, one in settings.items():
        assert {run["status"] for run in evidence.runs[name]} == {"finished"}
        for stored in (*evidence.runs[name], evidence.stored["step_times"][name]):
            options = _without(OLD_DETECTOR, stored["setting"]["options"])
            setting = stored["setting"] | {"options": options}
            assert setting == one.told(), f"{name} was made with other settings"


@pytest.mark.parametrize("name", ["README.md", "docs/evidence/README.md", "docs/evidence/where-it-does-not-help.md"])
def test_what_is_quoted_of_a_run_is_its_row(name: str) -> None:
    stored, shown = rows(RUNS), rows((ROOT / name).read_text(encoding="utf-8"))
    assert {next(iter(row)) for row in shown} <= {"run", DIFFERENCE, CLAIMS}
    quoted = [row for row in shown if CLAIMS not in row]
    assert quoted
    for row in quoted:
        assert len(row) > 1
        assert any(row.items() <= one.items() for one in stored), f"{name}: {row} is not as stored"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
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


def test_every_paragraph_of_measured_links_to_a_heading_with_its_rows() -> None:
    measured = README.split("## Measured")[1].split("\n## ")[0]
    paragraphs = [part for part in measured.strip().split("\n\n")[:-1] if not part.startswith("|")]
    assert len(paragraphs) >= 4
    for paragraph in paragraphs:
        assert re.search(r"\]\(docs/(evidence/small/tables|benchmarks)\.md#", paragraph), paragraph


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_every_setting_has_a_folder_and_a_base_that_differs_in_options_only(scale: str) -> None:
    settings = {one.name: one for one in grid(SCALES[scale])}
    assert len({one.folder(0) for one in settings.values()}) == len(settings) == len(grid(SCALES[scale]))
    for name, one in settings.items():
        base = settings[one.base]
        assert one.after is None or one.after in settings
        assert (one.preset, one.model) == (base.preset, base.model) or name == SMALL
        assert one.steps == base.steps or one.options == base.options  # bases of other lengths
