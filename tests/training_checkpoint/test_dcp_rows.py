"""Rows come from the disk one by one, whatever chunks and archives they are in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import SecateurError
from secateur.training_checkpoint.rows import read_rows
from secateur.training_checkpoint.stored import Chunk, StoredBytes, StoredTensor

VALUES = torch.arange(7 * 5 * 2, dtype=torch.float32).reshape(7, 5, 2)
GRID = ((0, 3, 7), (0, 4, 5))  # cuts of axes 0 and 1


def archive(path: Path, value: Tensor, offsets: tuple[int, ...]) -> Chunk:
    """A chunk in the middle of a file."""
    with path.open("ab") as file:
        file.write(b"front")
        start = file.tell()
        torch.save(value, file)
        length = file.tell() - start
        file.write(b"back")
    place = StoredBytes(path=path, start=start, length=length)
    return Chunk(offsets=offsets, sizes=tuple(value.shape), place=place, is_archive=True)


def stored(value: Tensor, chunks: list[Chunk]) -> StoredTensor:
    return StoredTensor(name="w", dtype=value.dtype, shape=tuple(value.shape), chunks=tuple(chunks))


def in_grid(path: Path, value: Tensor) -> StoredTensor:
    chunks = []
    for top, bottom in zip(GRID[0], GRID[0][1:], strict=False):
        for left, right in zip(GRID[1], GRID[1][1:], strict=False):
            chunks.append(archive(path, value[top:bottom, left:right].clone(), (top, left, 0)))
    return stored(value, chunks)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 6), unique=True))
def test_rows_in_any_order_come_together_from_a_grid_of_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int]
) -> None:
    tensor = in_grid(tmp_path_factory.mktemp("grid") / "f", VALUES)
    assert torch.equal(read_rows(tensor, rows), VALUES[rows])


def test_no_chunk_gives_a_row_of_the_next_one_whichever_is_read_last(tmp_path: Path) -> None:
    tensor = in_grid(tmp_path / "f", VALUES)
    backwards = stored(VALUES, list(tensor.chunks)[::-1])
    for rows in ([3], [6, 3, 2, 0], [2, 3, 4]):
        assert torch.equal(read_rows(backwards, rows), VALUES[rows])


def test_a_range_is_the_same_as_its_list(tmp_path: Path) -> None:
    tensor = in_grid(tmp_path / "f", VALUES)
    for first in range(7):
        for last in range(first, 8):
            assert torch.equal(read_rows(tensor, range(first, last)), VALUES[first:last])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    value = VALUES.to(dtype)
    found = read_rows(stored(value, [archive(tmp_path / "f", value, (0, 0, 0))]), [6, 0, 1])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), value[[6, 0, 1]].view(torch.uint8))


def test_a_tensor_without_axes_and_one_without_entries(tmp_path: Path) -> None:
    scalar = torch.tensor(5)
    assert torch.equal(read_rows(stored(scalar, [archive(tmp_path / "f", scalar, ())]), [0]), scalar)
    assert read_rows(stored(torch.empty(0, 3), []), range(0)).shape == (0, 3)


def test_a_view_and_a_transposed_tensor_are_read_as_the_tensors_they_are(tmp_path: Path) -> None:
    for number, value in enumerate((VALUES[2:], VALUES.permute(1, 0, 2), torch.arange(9.0)[3:7])):
        tensor = stored(value, [archive(tmp_path / str(number), value, (0,) * value.dim())])
        assert torch.equal(read_rows(tensor, [3, 1]), value[[3, 1]])


def test_what_is_not_the_tensor_that_the_checkpoint_says_is_refused(tmp_path: Path) -> None:
    chunk = archive(tmp_path / "f", VALUES, (0, 0, 0))
    for other in (VALUES.double(), VALUES[:6], torch.zeros(7, 5, 2).to_sparse()):
        wrong = archive(tmp_path / "f", other, (0, 0, 0))
        with pytest.raises(SecateurError, match=r"w holds .*, expected \(7, 5, 2\) torch\.float32"):
            read_rows(stored(VALUES, [Chunk(**(vars(chunk) | {"place": wrong.place}))]), [0])
    with (tmp_path / "f").open("ab") as file:
        start = file.tell()
        torch.save({"not": "a tensor"}, file)
        place = StoredBytes(path=tmp_path / "f", start=start, length=file.tell() - start)
    with pytest.raises(SecateurError, match="w holds dict"):
        read_rows(stored(VALUES, [Chunk(**(vars(chunk) | {"place": place}))]), [0])


def test_bytes_that_run_something_when_unpickled_do_not(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    with (tmp_path / "f").open("wb") as file:
        torch.save(Runs(), file)
    place = StoredBytes(path=tmp_path / "f", start=0, length=(tmp_path / "f").stat().st_size)
    with pytest.raises(SecateurError, match="cannot be read"):
        read_rows(stored(VALUES, [Chunk(offsets=(0, 0, 0), sizes=(7, 5, 2), place=place, is_archive=True)]), [0])
    assert not (tmp_path / "ran").exists()
