"""Whatever a library makes of a disk that refuses, the message names the file and says what the system said."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur.files.refused import refusal_in_words, refused_by_the_disk
from secateur.train.distributed.save import failures_as

BIG = torch.zeros(2**19)  # 2 MiB


def by_torch(path: Path) -> None:
    torch.save({"a": BIG}, path)


def by_safetensors(path: Path) -> None:
    save_file({"a": BIG}, path)


def by_a_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"word {number}": number for number in range(60_000)})).save(str(path))


def by_distributed(path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path.mkdir(exist_ok=True)
    with failures_as(OSError, str(path)):
        save({"a": BIG}, storage_writer=FileSystemWriter(path), no_dist=True)


def by_python(path: Path) -> None:
    path.write_bytes(bytes(2**21))


WRITERS: list[Callable[[Path], None]] = [by_torch, by_safetensors, by_a_tokenizer, by_distributed, by_python]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a file system needs root")
    words = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"cannot mount a small file system here: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # writers of others may still hold files open


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may grow beyond 1 MiB."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def refused(write: Callable[[Path], None], path: Path, number: int) -> None:
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, refused_by_the_disk(path):
        write(path)
    assert caught.value.errno == number
    assert str(caught.value.filename).startswith(str(path))
    assert refusal_in_words(caught.value) == f"{caught.value.filename}: {os.strerror(number)}"


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_says_so_whoever_writes(small_disk: Path) -> None:
    for write in WRITERS:
        path = small_disk / "new"
        refused(write, path, errno.ENOSPC)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_limit_of_files_says_so_whoever_writes(tmp_path: Path, limited: None) -> None:
    for write in WRITERS:
        refused(write, tmp_path / write.__name__, errno.EFBIG)


def test_what_has_another_cause_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    for error in (RuntimeError("a bug"), TypeError("another")):
        with pytest.raises(type(error), match=str(error)), refused_by_the_disk(tmp_path / "file"):
            raise error

    def stumble() -> None:
        try:
            (tmp_path / "missing").read_text()
        except FileNotFoundError:
            raise RuntimeError("a bug")  # noqa: B904 - what was found on the way is not why it failed

    with pytest.raises(RuntimeError, match="a bug"), refused_by_the_disk(tmp_path):
        stumble()
    assert (tmp_path / "file").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_first_cause_that_the_system_names_is_told(tmp_path: Path) -> None:
    def fail() -> Any:
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        except OSError:
            raise RuntimeError("could not write")  # noqa: B904

    with pytest.raises(OSError, match="quota") as caught, refused_by_the_disk(tmp_path / "file"):
        fail()
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_that_is_made_to_ask_the_disk_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), refused_by_the_disk(tmp_path / "file"):
        raise RuntimeError("a bug")
    assert list(tmp_path.iterdir()) == []
