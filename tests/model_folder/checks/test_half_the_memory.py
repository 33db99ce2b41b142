"""A checkpoint is pruned, and every claim but one is proved, in half as much memory as it has bytes."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from secateur.model_folder.rewrite.report import VERIFIED
from secateur.modeling_secateur import layer_of
from support.claims import fallen, not_checked
from support.long_tests import long
from support.model_folders import INDEX

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks"))
memory_limit: Any = importlib.import_module("memory_limit")

LAYERS = 28  # of 50 MB: half of all of it is what a process with torch and transformers needs, and two layers beside


def noisy(folder: Path) -> int:
    """A model of LAYERS small layers whose weights are pieces of one noise; its bytes."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        num_hidden_layers=LAYERS,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    config.save_pretrained(folder)
    noise = torch.randn(4 * 2**20, generator=torch.Generator().manual_seed(0)).mul_(0.05).bfloat16()
    listed, total = {}, 0
    for layer in range(LAYERS + 1):  # the last one: what lies outside the layers
        tensors = {}
        for name in [name for name in state if (layer_of(name) if "layers" in name else LAYERS) == layer]:
            start, count = 1009 * (len(listed) + len(tensors)), math.prod(state[name].shape)
            piece = noise.repeat(-(-(count + start) // len(noise)))[start : start + count]
            tensors[name] = piece.reshape(state[name].shape).clone()
            total += piece.nbytes
        file = f"model-{layer + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return total


@pytest.mark.slow
@pytest.mark.process
@long
@pytest.mark.skipif(memory_limit.why_not() is not None, reason=str(memory_limit.why_not()))
def test_a_model_is_pruned_and_proved_in_half_as_much_memory_as_it_has_bytes(tmp_path: Path) -> None:
    total = noisy(tmp_path / "source")
    words = ["prune", tmp_path / "source", "--keep", "0.5", "--criterion", "weight_norm", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = memory_limit.run_limited([sys.executable, "-m", "secateur", *map(str, words)], total // 2, environment)
    assert done.status == 0, done.errors[-2000:]
    checks = json.loads((tmp_path / "out" / VERIFIED).read_text())["checks"]
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"})
    assert "bit for bit, one layer in memory at a time" in done.output
