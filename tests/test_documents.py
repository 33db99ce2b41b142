"""The documents keep their promises: code blocks and examples run, tables show stored numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import runpy
import sys
from inspect import isfunction, signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

import secateur
from secateur.data.packing import BlockDataset, PackedTokens
from secateur.model_folder.measure import data_choice
from secateur.pretraining.presets import PRESETS
from support.docs_tables import DOCS, TABLES, with_table
from support.models_with_text import model_with_text
from support.small_runs import in_child
from support.works_with import WORKS_WITH, Row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
EVIDENCE = ("laep_tables_small", "laep_why")  # their tables are docs/evidence/small; see test_evidence_pages.py


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RUNS = len(json.loads((ROOT / "benchmarks/results/laep_tables_small.json").read_text(encoding="utf-8"))["runs"])
# Document, what stands before and behind the number in it -> the number.
COUNTED = {
    ("README.md", r"These are some of \[(\w+) runs\]"): RUNS,
    ("docs/benchmarks.md", r"The (\w+) runs that show what\sLAEP does"): RUNS,
    ("docs/evidence/README.md", r"(\w+) training\sruns of models"): RUNS,
}


@pytest.mark.parametrize(("document", "name"), TABLES)
def test_tables_are_those_of_the_source(document: str, name: str) -> None:
    text = (DOCS / document).read_text(encoding="utf-8")
    assert with_table(text, name, TABLES[document, name]()) == text, "write it anew with `make docs-tables`"


@pytest.mark.parametrize("row", WORKS_WITH, ids=lambda row: row.what)
def test_every_row_of_what_laep_works_with_has_a_test(row: Row) -> None:
    file, _, name = row.test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README's code takes as given: a model, arguments, data, an optimizer, a loader."""
    monkeypatch.chdir(tmp_path)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (64, 32), dtype=torch.int32)
    packed = PackedTokens(blocks=tokens, num_documents=1, num_tokens=tokens.numel(), num_dropped=0, tokens_by_domain={})
    model = AutoModelForCausalLM.from_config(config).train()
    batch = {"input_ids": tokens[:2].long(), "labels": tokens[:2].long()}
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "Trainer": Trainer,
        "model": model,
        "args": TrainingArguments(
            str(tmp_path / "out"), max_steps=6, report_to="none", save_strategy="no", dataloader_pin_memory=False
        ),
        "dataset": BlockDataset(packed),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [batch] * 3,
    }


def test_every_python_block_of_the_readme_runs(names: dict[str, Any]) -> None:
    assert len(blocks(README)) >= 2
    for block in blocks(README):
        exec(compile(block, "README.md", "exec"), names)


def test_every_python_block_of_the_page_about_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_choice, "SAMPLES", 6)  # of a tiny model that takes 64 tokens
    monkeypatch.setitem(data_choice.TEXT, "sequence_length", 16)
    model_with_text(tmp_path)
    for name, now in (
        ("source", "models/Qwen3-30B-A3B"),
        ("code.jsonl", "calibration.jsonl"),
        ("prose.jsonl", "held-out.jsonl"),
    ):
        (tmp_path / now).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / now)
    names: dict[str, Any] = {}
    for block in blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8")):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["decided"].experts_after == {0: 6, 1: 6, 2: 6}
    said = capsys.readouterr().out
    assert all(f"{what}: " in said for what in ("observing, layer 2 of 3", "writing", "comparing"))


def test_the_page_about_python_names_every_function_and_fields_that_are_there() -> None:
    rows = re.findall(r"^\| `(\w+)\((\w+).*?\| .*? \| (.*) \|$", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
    assert {name for name, _, _ in rows} == {
        name for name in secateur.__all__ if isfunction(getattr(secateur, name))
    } - {"remove_into_zero_slots_"}
    for name, first, returned in rows:
        function = getattr(secateur, name)
        assert first == next(iter(signature(function).parameters))
        fields = {one.name for one in dataclasses.fields(get_type_hints(function)["return"])}
        quoted = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|with their .*?,|with their range", "", returned)))
        assert quoted <= fields, name


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs_and_prunes(example: Path, tmp_path: Path) -> None:
    assert in_child(run_program, example, tmp_path / "said") == 0
    assert re.search(r"experts \d+ -> \d+, parameters", (tmp_path / "said").read_text())


def run_program(path: Path, said: Path) -> None:
    sys.argv = [str(path)]
    with said.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem not in EVIDENCE], ids=lambda path: path.stem)
def test_stored_tables_are_the_ones_the_documents_show(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    shown = README + "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("benchmarks.md", "faults.md")
    )
    columns, *rows = result["table"]
    for row in [columns, *rows]:
        assert "| " + " | ".join(row) + " |" in shown, f"{path.name}: no table line for {row}"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_how_they_were_made(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"versions", "hardware", "command", "date"} <= set(result)
    assert (ROOT / result["command"][1]).exists()


@pytest.mark.parametrize(("page", "sentence"), COUNTED, ids=str)
def test_a_number_in_a_sentence_is_that_of_the_code(page: str, sentence: str) -> None:
    (said,) = re.findall(sentence, (ROOT / page).read_text(encoding="utf-8"))
    assert int(said) == COUNTED[page, sentence]


def test_the_presets_that_the_readme_lists_are_those_of_the_code() -> None:
    (listed,) = re.findall(r"^Presets: ([\w, ]+) - ", README, re.MULTILINE)
    assert listed.split(", ") == list(PRESETS)


STEPS = [step for step in re.split(r"\n\n|\n(?=\d\. |## )", CONTRIBUTING) if re.search(r"`[\w/]+\.py`", step)]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: " ".join(step.split()[:5]))
def test_files_and_names_that_contributing_sends_to_are_there(step: str) -> None:
    """A file by its path, and beside a file the names of code that are to be found in it."""
    quoted = re.findall(r"`([^`\n]+)`", step)
    folders = [ROOT, *(ROOT / word for word in quoted if word.startswith("src/") and word.endswith("/"))]
    files = []
    for word in (word for word in quoted if re.search(r"\w\.(py|md)$", word)):
        found = [folder / word for folder in folders if (folder / word).is_file()]
        assert found, f"{word}: not a path from the root or from a folder that is named here"
        files += found
    code = "".join(path.read_text(encoding="utf-8") for path in [*files, *(one / "__init__.py" for one in folders[1:])])
    for name in quoted:
        if re.fullmatch(r"[A-Z][A-Za-z]+|[A-Z_]+|[a-z]+_[a-z_]+", name):
            assert re.search(rf"\b{name}\b", code), f"{name} is in none of {files}"
