"""A benchmark that somebody runs leaves what the documents show as it is, unless it is told to `--store`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
record: Any = importlib.import_module("record")

# The scripts that have a result; the others fetch data, work in a folder that they are given, or are imported.
SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "from record import" in path.read_text()]


def shown() -> dict[Path, bytes]:
    """What documents show."""
    folders = (record.RESULTS, record.DOCS, BENCHMARKS / "data")
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
    importlib.import_module(name).main()


def test_every_stored_result_is_that_of_a_script() -> None:
    stored = {path.stem.removesuffix("_small") for path in record.RESULTS.glob("*.json")}
    assert stored <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_the_option_and_writes_by_it_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(name, monkeypatch, "--help")
    assert "--store" in capsys.readouterr().out
    code = (BENCHMARKS / f"{name}.py").read_text().split('"""', 2)[2]
    assert len(re.findall(r"[^_]store\(", code)) == code.count("stored=arguments.store")
    assert not re.search(r'"docs"|RESULTS /', code)


def test_a_run_writes_into_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = shown()
    run("laep_scale", monkeypatch, "--gather", "10")
    assert shown() == before
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [
        "benchmark-results/laep_scale.json"
    ]


def test_only_with_store_it_takes_the_place_of_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "DOCS", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["laep_scale.py", "--store", "/somewhere/text"])
    path = record.store("laep_scale", {"table": []}, stored=True)
    assert path == tmp_path / "results" / "laep_scale.json"
    assert json.loads(path.read_text())["command"] == ["python", "benchmarks/laep_scale.py", "text"]
    assert record.docs_in(True, "images") == tmp_path / "docs" / "images"
    assert record.docs_in(False, "images") == Path("benchmark-results/images")


def test_pages_are_made_of_the_results_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = shown()
    own = record.results_in(False)
    for name in ("laep_tables_small", "laep_why"):
        (own / f"{name}.json").write_bytes((record.RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(importlib.import_module("laep_evidence_figures"), "FIGURES", {})  # they take seconds
    run("laep_evidence", monkeypatch)
    assert shown() == before
    assert (own / "evidence/small/tables.md").read_bytes() == (ROOT / "docs/evidence/small/tables.md").read_bytes()
