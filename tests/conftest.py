"""For all tests: one thread, no network, quiet transformers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of children too: sums are rounded by the number of threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)

# Modules whose tests share what takes long to make; with `--dist loadgroup` one worker makes it, and not each its own.
TOGETHER = {
    "test_torchrun": "jobs",
    "test_torchrun_faults": "jobs",
    **{
        name: name
        for name in (
            "test_distributed_laep",
            "test_distributed_rows",
            "test_distributed_surgery",
            "test_finetune",
            "test_finetune_images",
            "test_observe_command",
            "test_saved_models",
            "test_vision_commands",
        )
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (group := TOGETHER.get(item.path.stem)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
