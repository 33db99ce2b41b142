"""Checkpoints that two processes wrote in shards, and that two processes load again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from secateur.train.distributed.launch import join, leave
from secateur.training_checkpoint.apply import apply_to_checkpoint
from secateur.training_checkpoint.metadata import read_dcp
from secateur.training_checkpoint.shards import read_shards
from support.dcp_checkpoints import PLAN, tensors_of
from support.small_jobs import Ended, job

RANKS = 2
# layer 1 has no experts; 7 rows over 2 ranks are 4 and 3, 1 row is 1 and none
SHAPES = {f"model.layers.{n}.mlp.experts.gate_up_proj": (8, 6, 5) for n in (0, 2)}
SHAPES |= {f"model.layers.{n}.mlp.gate.weight": (8, 5) for n in (0, 2)}
SHAPES |= {"model.embed_tokens.weight": (7, 5), "model.norm.weight": (1,), "model.layers.1.mlp.up_proj.weight": (4, 3)}
PLACEMENTS = {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate": Replicate()}


def full() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state = {f"optimizer.state.{n}.{key}": torch.randn(SHAPES[n], generator=generator)
             for n in SHAPES for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    return tensors | state


def pruned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        layer = next((n for n in PLAN.layers if f"layers.{n}.mlp" in name), None)
        found[name] = value if layer is None else value[list(PLAN.layers[layer].order)]
    return found


def sharded(tensors: dict[str, Tensor], placement: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    where = PLACEMENTS[placement]
    return {
        name: distribute_tensor(value, mesh, [where if value.dim() > 1 or placement == "Shard(0)" else Replicate()])
        for name, value in tensors.items()
    }


CASES = {"one": ("Shard(0)", "Shard(1)"), "other": ("Shard(1)", "Shard(0)"), "copies": ("Replicate", "Shard(0)")}


def write(folder: str) -> None:
    join()
    for case, (placement, _) in CASES.items():
        for name, writer in (("dcp", dcp.FileSystemWriter), ("shards", shards_writer)):
            to = os.path.join(folder, case, "source", name)
            dcp.save(sharded(full(), placement), storage_writer=writer(to))
    leave()


def shards_writer(folder: str) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(folder, save_distributed=True)


def read(folder: str) -> None:
    join()
    expected = pruned(full())
    for case, (_, placement) in CASES.items():
        for name, reader in (("dcp", dcp.FileSystemReader), ("shards", HuggingFaceStorageReader)):
            state = sharded({key: torch.zeros_like(value) for key, value in expected.items()}, placement)
            dcp.load(state, storage_reader=reader(os.path.join(folder, case, "out", name)))
            for key, value in state.items():
                assert isinstance(value, DTensor)
                assert torch.equal(value.full_tensor(), expected[key]), (case, name, key)
    leave()


@pytest.mark.torchrun
@pytest.mark.slow
def test_shards_of_two_ranks_become_the_pruned_tensors_on_two_ranks(tmp_path: Path) -> None:
    assert job(RANKS, write, str(tmp_path), folder=tmp_path) == Ended((0, 0), "")
    for case, (before, _) in CASES.items():
        source, out = tmp_path / case / "source", tmp_path / case / "out"
        for name, read_folder in (("dcp", read_dcp), ("shards", read_shards)):
            chunks = read_folder(source / name).tensors["model.layers.0.mlp.experts.gate_up_proj"].chunks
            assert len(chunks) == (1 if before == "Replicate" else RANKS)
        apply_to_checkpoint(source, PLAN, out)
        found = tensors_of(out / "dcp")
        assert all(torch.equal(found[name], value) for name, value in pruned(full()).items())
    assert job(RANKS, read, str(tmp_path), folder=tmp_path) == Ended((0, 0), "")
