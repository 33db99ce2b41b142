"""Whatever is damaged in a file that somebody else wrote: it is read, or refused in one line that names it.

Within 5 s of CPU time and 300 MB, in a child that is killed beyond; the large campaign is benchmarks/faults.py. What
our own records refuse is in files/test_damaged_records.py.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.data.chats import read_chats
from secateur.data.corpus import read_documents
from secateur.data.images import read_images
from secateur.errors import SecateurError
from secateur.files.archive import MAX_PACKING
from secateur.model_folder.read.inspect import inspect
from secateur.model_folder.stream.states import DiskStates
from secateur.observation.sglang import read_recording
from secateur.train.resumed import check_state, read_plain
from support.damage import (
    ALWAYS_WRONG,
    HOSTILE,
    WRONG,
    Damaged,
    damaged_bytes,
    damaged_file,
    damaged_json,
    damaged_zip,
    hostile_pickles,
)
from support.forked import outcomes
from support.model_folders import saved

COUNTS = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
STATE = {
    "global_step": 2,
    "max_steps": 4,
    "num_train_epochs": 1,
    "epoch": 0.5,
    "log_history": [{"loss": 1.5, "step": 2, "prune_event": {"alpha": None}}],
    "stateful_callbacks": {"TrainerControl": {"args": {"should_log": False}, "attributes": {}}},
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 2,
}


@dataclass(frozen=True)
class Reader:
    """file: what is damaged, in a folder that `make` fills. damages: of its content. every: only every so-manyth."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damages: Callable[[bytes, Path], Iterator[Damaged]] = lambda data, path: damaged_file(path.name, data)
    every: int = 1


def torch_file(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def odd_recordings(data: bytes, path: Path) -> Iterator[Damaged]:
    """Tensors that are none of numbers in a row, sizes that nobody has, code, and damaged archives."""
    odd: dict[str, Callable[[], torch.Tensor]] = {
        "quantised": lambda: torch.quantize_per_tensor(torch.rand(2, 3, 8), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 8).long(), torch.ones(3, 8).long()]),
        "jagged": lambda: torch.nested.nested_tensor(
            [torch.ones(2, 8).long(), torch.ones(3, 8).long()], layout=torch.jagged
        ),
        "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(3, 1).long(), torch.ones(1).long(), (2**20,) * 3),
        "meta": lambda: COUNTS.to("meta"),
        "no steps": lambda: COUNTS[:0],
        "no experts": lambda: COUNTS[:, :, :0],
        "no table": lambda: COUNTS[0, :0],
        "one number a trillion times": lambda: torch.ones(1, 1, 1).long().expand(2**20, 2**10, 2**10),
        "a sum beyond counting": lambda: torch.full((2, 3, 8), 2**62),
        "unsigned": lambda: COUNTS.to(torch.uint64),
    }
    for what, make in odd.items():
        yield Damaged("tensor", what, torch_file({"logical_count": make()}))
    yield from hostile_pickles(str(path.parent / "harmed"))
    yield from islice(damaged_archive(data, path), 0, None, 3)


def damaged_archive(data: bytes, path: Path) -> Iterator[Damaged]:
    return damaged_zip(data, count=30, bomb=MAX_PACKING * 2**20)


def damaged_pickles(data: bytes, path: Path) -> Iterator[Damaged]:
    yield from hostile_pickles(str(path.parent / "harmed"))
    yield from islice(damaged_archive(data, path), 0, None, 3)


def lines_after_a_whole_one(data: bytes, path: Path) -> Iterator[Damaged]:
    for damage in damaged_json(json.loads(data), WRONG | ALWAYS_WRONG | HOSTILE):
        yield damage._replace(data=data + b"\n" + damage.data + b"\n")


def png(width: int, height: int, num_bytes: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(num_bytes), 1)) + chunk(b"IEND", b"")


def damaged_images(data: bytes, path: Path) -> Iterator[Damaged]:
    yield Damaged("size", "10000 x 10000", png(10_000, 10_000, 1_000_000))
    yield Damaged("size", "65535 x 65535", png(65_535, 65_535, 1000))
    yield from damaged_bytes(data)


def write_image(folder: Path) -> None:
    (folder / "class").mkdir()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(folder / "class/a.png")


def write_stage(folder: Path) -> None:
    states = DiskStates(folder / "states")
    states.form = "tensor"
    states.put(1, 0, torch.ones(2, 3, 4))
    states.finish(1)


READERS = {
    "config": Reader(
        "source/config.json",
        lambda folder: saved("qwen3_moe", folder / "source"),
        lambda path: inspect(path.parent),
        every=29,
    ),
    "npz": Reader(
        "a.npz",
        lambda folder: np.savez(folder / "a.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4)),
        lambda path: read_images(path).digest(),
        damaged_archive,
    ),
    "image": Reader("class/a.png", write_image, lambda path: read_images(path.parent.parent).digest(), damaged_images),
    "recording": Reader(
        "a.pt",
        lambda folder: (folder / "a.pt").write_bytes(torch_file({"logical_count": COUNTS})),
        read_recording,
        odd_recordings,
    ),
    "pickle of a checkpoint": Reader(
        "scheduler.pt",
        lambda folder: (folder / "scheduler.pt").write_bytes(torch_file({"last_epoch": 2, "base_lrs": [0.1]})),
        read_plain,
        damaged_pickles,
    ),
    "state of a training": Reader(
        "checkpoint-2/trainer_state.json",
        lambda folder: (
            (folder / "checkpoint-2").mkdir(),
            (folder / "checkpoint-2/trainer_state.json").write_text(json.dumps(STATE)),
        ),
        lambda path: check_state(path.parent),
        every=5,
    ),
    "texts": Reader(
        "a.jsonl",
        lambda folder: (folder / "a.jsonl").write_text('{"text": "a b", "more": {"x": [1]}}'),
        lambda path: [one.text.encode() for one in read_documents([str(path)])],
        lines_after_a_whole_one,
    ),
    "chats": Reader(
        "a.jsonl",
        lambda folder: (folder / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}'),
        lambda path: [json.dumps(one.messages).encode() for one in read_chats(str(path), "text") or ()],
        lines_after_a_whole_one,
    ),
    "hidden states": Reader(
        "states/00001/000000.safetensors",
        write_stage,
        lambda path: DiskStates(path.parent.parent).get(1, 0),
        every=5,
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch, at tensors that nobody should make
@pytest.mark.parametrize("name", READERS)
def test_damage_is_read_or_refused_in_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    reader.make(tmp_path)
    path = tmp_path / reader.file
    whole = path.read_bytes()
    reader.read(path)
    inputs = list(islice(reader.damages(whole, path), 0, None, reader.every))

    def read(damage: Damaged) -> None:
        path.write_bytes(damage.data)
        reader.read(path)

    found = outcomes(read, inputs)
    assert [
        (damage.name, one)
        for damage, one in zip(inputs, found, strict=True)
        if one.kind not in ("read", "refused")
        or (one.kind == "refused" and (path.name not in one.message or not one.message.isprintable()))
    ] == []
    assert sum(one.kind == "refused" for one in found) > len(found) / 3
    assert not (tmp_path / "harmed").exists()


def test_hidden_states_that_were_changed_are_not_gone_on_with(tmp_path: Path) -> None:
    write_stage(tmp_path)
    path = tmp_path / "states/00001/000000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SecateurError, match=r"000000\.safetensors: not what an unfinished run writes, use --restart"):
        DiskStates(tmp_path / "states").get(1, 0)


def config_changed(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 9_999, "num_hidden_layers is 9999, expected at most 256, as the tensors are of 3 layers"),
        ("num_experts", 10**6, "num_experts is 1000000, expected at most"),
        ("num_experts_per_tok", 10**6, "num_experts_per_tok is 1000000, expected at most 8, as there are 8 experts"),
        ("attention_dropout", 1.5, "attention_dropout is 1.5, expected a number from 0 to 1"),
        ("vision_config", {"a": {"depth": 10**9}}, "vision_config.a.depth is 1000000000, expected at most 256"),
    ],
)
def test_a_number_of_the_config_is_compared_with_the_files_before_a_model_is_built(
    key: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("qwen3_moe", tmp_path / "source")
    monkeypatch.setattr("secateur.model_folder.read.config.read_config", lambda config: pytest.fail("it is built"))
    with pytest.raises(SecateurError, match=f"config.json: {message}"):
        inspect(config_changed(tmp_path / "source", **{key: value}))


def test_a_build_far_larger_than_the_files_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("qwen3_moe", tmp_path / "source")
    monkeypatch.setattr("secateur.model_folder.read.plausible.MODULES", -10_000)
    with pytest.raises(SecateurError, match=r"a model of more than -\d+ modules, but the files hold \d+ tensors"):
        inspect(tmp_path / "source")


def test_a_table_far_larger_than_the_files_is_not_computed(tmp_path: Path) -> None:
    """Of what no file holds, so that no shape in the files speaks against it."""
    saved("qwen3_moe", tmp_path / "source")
    with pytest.raises(SecateurError, match=r"config\.json, .*inv_freq of 2199023255552 bytes, but the files hold \d+"):
        inspect(config_changed(tmp_path / "source", head_dim=2**40))
