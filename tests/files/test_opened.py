"""What is no file is refused by its name and the reason; a pipe is read where that is said."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.files import opened as module
from secateur.files.json import read_json, read_object
from secateur.files.opened import opened, read_bytes
from secateur.files.safetensors_header import read_header

ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "it is a folder, expected a file"),
    "pipe": (os.mkfifo, "it is a pipe, "),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "it is a socket, expected a file"),
    "link": (lambda path: path.symlink_to("nowhere"), "it is a link to nothing"),
    "device": (lambda path: path.symlink_to("/dev/null"), "it is a device, expected a file"),
    "nothing": (lambda path: None, "No such file or directory"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("read", [read_json, read_header, lambda path: read_bytes(path, most=10)])
def test_what_is_no_file_is_refused_by_name_and_reason(
    kind: str, read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0)
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make, reason = ODD[kind]
    make(Path("odd"))
    with pytest.raises(SecateurError, match=rf"^odd: cannot be read \({reason}"):
        read(Path("odd"))


def test_a_pipe_is_a_file_only_where_that_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    both = os.open(tmp_path / "pipe", os.O_RDWR)  # somebody writes
    os.write(both, b"{}")
    with pytest.raises(SecateurError, match="it is a pipe, expected a file"), opened(tmp_path / "pipe"):
        raise AssertionError
    with opened(tmp_path / "pipe", pipes=True) as file:
        assert os.read(file.fileno(), 2) == b"{}"
    os.close(both)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"{}")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(SecateurError, match=r"a: cannot be read \(Permission denied\)$"):
        read_object(tmp_path / "a")


def test_an_opened_file_is_read_from_its_beginning_and_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with opened(tmp_path / "a") as file:
        assert file.read() == b"abc"
    assert file.closed
    with pytest.raises(SecateurError, match="a: 3 bytes, expected at most 2"):
        read_bytes(tmp_path / "a", most=2)
