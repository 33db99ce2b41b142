"""What a release says of itself: one version and one date in every place, and citation fields that readers need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from secateur.version import __version__

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
SECTIONS = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
CLOSED = re.compile(r"(\d+\.\d+\.\d+) \((\d{4}-\d{2}-\d{2})\)")


def test_the_version_and_its_date_are_the_same_everywhere() -> None:
    newest = next(found.groups() for section in SECTIONS if (found := CLOSED.fullmatch(section)))
    assert newest == (__version__, str(CITATION["date-released"]))
    assert CITATION["version"] == __version__


def test_the_changelog_has_one_open_section_above_the_closed_ones() -> None:
    assert SECTIONS[0] == "Unreleased"
    assert len(SECTIONS) > 1
    assert all(CLOSED.fullmatch(section) for section in SECTIONS[1:])


def test_the_citation_has_the_fields_of_its_format() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "abstract", "authors"} <= set(CITATION)
    assert (CITATION["type"], CITATION["license"]) == ("software", "Apache-2.0")
    papers = {paper["identifiers"][0]["value"]: paper for paper in CITATION["references"]}
    assert set(papers) == {"arXiv:2601.14327", "arXiv:2405.16646"}
    assert all({"type", "title", "authors", "year"} <= set(paper) for paper in papers.values())
