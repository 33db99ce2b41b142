"""Metadata of several entries, which safetensors writes in any order, get one order, and no other byte changes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.files.safetensors_header import sort_metadata_in


def test_metadata_are_sorted_in_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5), "a é": torch.rand(3)}
    metadata = {f"key {number} \\ é": f"text {number}" for number in range(9)}
    seen = set()
    for turn in range(8):
        path = tmp_path / str(turn)
        save_file(tensors, path, metadata=metadata)
        size = path.stat().st_size
        sort_metadata_in(path)
        assert path.stat().st_size == size
        seen.add(path.read_bytes())
    assert len(seen) == 1
    found = load_file(path)
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
