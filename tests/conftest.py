"""For all tests: one thread, no network, quiet transformers, files in memory, the longest test files first."""

from __future__ import annotations

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of children too: sums are rounded by the number of threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)
MEMORY, ROOM = "/dev/shm", 4 * 2**30  # waiting for a disk takes a quarter of the time there, and says nothing here
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
LONGEST = ("torchrun", "process")  # by what their tests need


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: then no worker is left with one of them at the end, while the others wait."""
    ranks = dict.fromkeys((item.path for item in items), len(LONGEST))
    for item in items:
        marks = [LONGEST.index(mark.name) for mark in item.iter_markers() if mark.name in LONGEST]
        ranks[item.path] = min([ranks[item.path], *marks])
    items.sort(key=lambda item: ranks[item.path])
