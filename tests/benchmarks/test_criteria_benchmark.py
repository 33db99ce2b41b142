"""The benchmark of criteria observes all that the rows of the table read, on request too."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import criteria as benchmark
from secateur.criteria import CRITERIA
from secateur.data.batch import Batch
from secateur.families import describe_moe
from support.tiny_models import random_tokens, tiny_model


def test_a_sum_that_a_criterion_reads_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(CRITERIA["reap"], name="toy", needs=("weight_sum", "output_sum"))
    monkeypatch.setitem(CRITERIA, "toy", row)
    moe = describe_moe(tiny_model("qwen3_moe").eval())
    stats = benchmark.observed(moe, [Batch(input_ids=random_tokens(2, 12), attention_mask=None)])
    assert {"norm_sum", *row.sums} <= set(stats.sums)
