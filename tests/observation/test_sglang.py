"""Recordings of SGLang: their layers are matched with the model's, and what does not fit is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.observation.sglang import read_recording, stats_of_recording

COUNTS = {1: 4, 2: 4}  # experts of the layers of a model of three
STEPS = torch.tensor(
    [[[0, 0, 0, 0], [1, 2, 3, 0], [0, 4, 0, 2]], [[0, 0, 0, 0], [1, 0, 0, 1], [2, 0, 0, 0]]], dtype=torch.int32
)


def recording(path: Path, count: Any, **others: Any) -> Path:
    """What the recorder writes in its mode stat."""
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None, **others}, path)
    return path


def stats(recorded: Tensor, counts: dict[int, int] = COUNTS) -> Any:
    return stats_of_recording(recorded, counts, num_layers=3, top_k=2, where="recording counts.pt")


def test_steps_are_summed_and_rows_are_decoder_layers(tmp_path: Path) -> None:
    recorded, about = read_recording(recording(tmp_path / "a.pt", STEPS))
    found = stats(recorded)
    assert found.loads() == {1: [2, 2, 3, 1], 2: [2, 4, 0, 2]}
    assert [one.num_tokens for one in found.layers.values()] == [4, 4]
    assert found.sums == ()
    assert (about["format"], about["steps"], len(about["digest"])) == ("sglang", 2, 64)


def test_counts_beyond_32_bits_do_not_overflow(tmp_path: Path) -> None:
    count = torch.full((3, 1, 2), 2**31 - 1, dtype=torch.int32)
    recorded, _ = read_recording(recording(tmp_path / "a.pt", count))
    assert recorded.tolist() == [[3 * (2**31 - 1)] * 2]


def test_a_table_and_rows_of_moe_layers_only_are_accepted(tmp_path: Path) -> None:
    recorded, about = read_recording(recording(tmp_path / "a.pt", STEPS[0, 1:].to(torch.int64)))
    assert stats(recorded).loads() == {1: [1, 2, 3, 0], 2: [0, 4, 0, 2]}
    assert about["steps"] == 1


@pytest.mark.parametrize(
    ("recorded", "counts", "message"),
    [
        (torch.ones(4, 4), COUNTS, "4 layers, but the model has 3 decoder layers, 2 with experts"),
        (torch.ones(3, 4), COUNTS, "4 tokens for experts of layer 0, which has none"),
        (torch.ones(2, 5), COUNTS, "5 experts a layer, but layer 1 has 4"),
        (torch.tensor([[1, 1], [0, 0]]), {1: 2, 2: 2}, "no token for layer 2, which has experts"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(recorded: Tensor, counts: dict[int, int], message: str) -> None:
    with pytest.raises(SecateurError, match=rf"^recording counts\.pt: {message}"):
        stats(recorded.to(torch.int64), counts)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("harmed", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"records": []}, "mode per_pass or per_token; expected one of the mode stat"),
        ({"logical_count": torch.ones(2, 3, 4)}, r"torch.float32 \(2, 3, 4\), expected whole numbers"),
        ({"logical_count": torch.ones(4, dtype=torch.int64)}, r"torch.int64 \(4,\), expected"),
        ({"logical_count": [[1]]}, "logical_count is list, expected"),
        ({}, "logical_count is NoneType, expected"),
        (torch.ones(2), "logical_count is NoneType, expected"),
        ({"logical_count": torch.tensor([[-1, 2]])}, "negative counts, such as -1"),
        ({"logical_count": Harmful()}, "cannot be read as tensors and plain values"),
    ],
)
def test_other_files_are_refused_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.pt")
    with pytest.raises(SecateurError, match=rf"recording a.pt: .*{message}"):
        read_recording(Path("a.pt"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"logical_count": 1})[:-3]])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(SecateurError, match=r"a\.pt: not a whole zip archive"):
        read_recording(tmp_path / "a.pt")
    with pytest.raises(SecateurError, match="No such file"):
        read_recording(tmp_path / "b.pt")
