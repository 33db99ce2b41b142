"""Files are whole or as they were, and everybody the umask allows can read them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from secateur.files.atomic import atomic_write, flushed_meanwhile, write_together


def test_a_new_file_has_the_permissions_any_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "file", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")  # which fsync does not know
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_text_is_utf8_and_bytes_are_as_given(tmp_path: Path) -> None:
    atomic_write(tmp_path / "text", "é\n")
    atomic_write(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"


def test_of_files_that_are_written_together_no_new_one_stays_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")

    def write(name: str) -> None:
        if name == "last":
            raise OSError(28, "No space left on device")
        (tmp_path / name).write_text("new")

    with pytest.raises(OSError, match="No space left"):
        write_together({tmp_path / name: functools.partial(write, name) for name in ("new", "old", "last")})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "new"}


def test_what_is_flushed_meanwhile_is_on_the_disk_when_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, real = list[int](), os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    paths = [tmp_path / name for name in "ab"]
    with flushed_meanwhile() as flush:
        for path in paths:
            path.write_text(path.name)
            flush(path)
    assert flushed == [path.stat().st_ino for path in paths]


def test_a_disk_that_refuses_to_flush_is_told_with_the_file_unless_the_block_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "a").write_text("a")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"), flushed_meanwhile() as flush:
        flush(tmp_path / "a")

    def fails() -> None:
        with flushed_meanwhile() as flush:
            flush(tmp_path / "a")
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fails()
