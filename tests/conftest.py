"""For all tests: one thread, no network, quiet transformers, files in memory, the longest test files first."""

from __future__ import annotations

import gc
import itertools
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
KINDS = ("torchrun", "process")  # of the longest files, by what their tests need


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: then no worker is left with one of them at the end, while the others wait.

    Those with jobs of several ranks in turn with others, as the ranks of many jobs at once wait for each other.
    """
    kinds = dict.fromkeys((item.path for item in items), len(KINDS))
    for item in items:
        marks = [KINDS.index(mark.name) for mark in item.iter_markers() if mark.name in KINDS]
        kinds[item.path] = min([kinds[item.path], *marks])
    jobs, processes, rest = ([path for path, kind in kinds.items() if kind == one] for one in range(len(KINDS) + 1))
    in_turn = [path for pair in itertools.zip_longest(jobs, processes) for path in pair if path is not None]
    order = {path: place for place, path in enumerate([*in_turn, *rest])}
    items.sort(key=lambda item: order[item.path])


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every search for garbage, which else takes a twentieth of the time."""
    gc.freeze()
