"""The documents keep their promises: code blocks and examples run, tables show stored numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

from secateur.data.packing import BlockDataset, PackedTokens

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
EVIDENCE = ("laep_tables_small", "laep_why")  # their tables are docs/evidence/small; see test_evidence_pages.py


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


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs_and_prunes(example: Path) -> None:
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"experts \d+ -> \d+, parameters", done.stdout)


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem not in EVIDENCE], ids=lambda path: path.stem)
def test_stored_tables_are_the_ones_the_documents_show(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    shown = README + (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    columns, *rows = result["table"]
    for row in [columns, *rows]:
        assert "| " + " | ".join(row) + " |" in shown, f"{path.name}: no table line for {row}"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_how_they_were_made(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"versions", "hardware", "command", "date"} <= set(result)
    assert (ROOT / result["command"][1]).exists()
