"""Whatever a library makes of a disk that refuses, the message names the file and says what the system said."""

from __future__ import annotations

import errno
import functools
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

from secateur.files.atomic import atomic_write
from secateur.files.new_folder import copy_file
from secateur.files.refused import UNREADABLE, naming, refusal_in, refusal_in_words, refused_by_the_disk
from secateur.model_folder.rewrite.pieces import Copy, NewTensor
from secateur.model_folder.rewrite.writer import Shard, write_shard
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


def by_copying_to_a_shard(path: Path, source: Path) -> None:
    piece = Copy(file="a", start=0, length=2**21)
    tensor = NewTensor(name="a", dtype="U8", shape=(2**21,), pieces=(piece,))
    write_shard(Shard(file="b", tensors=(tensor,)), lambda name: source, path, {}, lambda count: None)


def by_copying_through_memory(path: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "copy_file_range", raising=False)
        by_copying_to_a_shard(path, source)


def by_copying_a_file(path: Path, source: Path) -> None:
    copy_file(source, path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source"
    path.write_bytes(bytes(2**21))
    return path


@pytest.fixture
def writers(source: Path) -> list[Callable[[Path], None]]:
    copying = (by_copying_to_a_shard, by_copying_through_memory, by_copying_a_file)
    own = [functools.partial(write, source=source) for write in copying]
    return [by_torch, by_safetensors, by_a_tokenizer, by_distributed, by_python, *own]


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
    assert not Path(str(caught.value.filename)).is_dir()
    assert refusal_in_words(caught.value) == f"{caught.value.filename}: {os.strerror(number)}"


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_says_so_whoever_writes(small_disk: Path, writers: list[Callable[[Path], None]]) -> None:
    for write in writers:
        path = small_disk / "new"
        refused(write, path, errno.ENOSPC)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.process
def test_a_disk_without_a_byte_says_so_of_a_small_file_too(small_disk: Path, tmp_path: Path) -> None:
    """What is still in a buffer is tried again when the file is closed, and fails once more."""
    (tmp_path / "small").write_text("a few bytes")
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        (small_disk / "all").write_bytes(bytes(2**21))
    for write in (lambda path: copy_file(tmp_path / "small", path), lambda path: atomic_write(path, "a few bytes")):
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))) as caught:
            write(small_disk / "new")
        assert caught.value.filename == str(small_disk / "new")
        (small_disk / "new").unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_limit_of_files_says_so_whoever_writes(
    tmp_path: Path, writers: list[Callable[[Path], None]], limited: None
) -> None:
    for number, write in enumerate(writers):
        refused(write, tmp_path / f"{number}", errno.EFBIG)


@pytest.mark.parametrize("write", [by_copying_to_a_shard, by_copying_through_memory, by_copying_a_file])
def test_an_error_of_the_file_that_is_read_names_that(
    write: Callable[[Path, Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for where, name in ((os, "copy_file_range"), (os, "pread"), (shutil, "copyfileobj")):
        monkeypatch.setattr(where, name, broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write(tmp_path / "new", source)
    assert caught.value.filename == str(source)


def test_only_an_error_of_the_system_without_a_name_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for error, only, name in (
        (OSError(errno.EIO, "broken"), None, str(path)),
        (OSError(errno.EIO, "broken"), UNREADABLE, str(path)),
        (OSError(errno.ENOSPC, "full"), UNREADABLE, None),
        (OSError(errno.EIO, "broken", "another"), None, "another"),
        (OSError("without a number"), None, None),
    ):
        with pytest.raises(OSError, match=r"broken|full|without a number") as caught, naming(path, only):
            raise error
        assert caught.value.filename == name


def test_of_a_folder_the_file_is_named_that_was_written_to_last(tmp_path: Path) -> None:
    for at, name in enumerate(("b", "c", "a")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(at, at))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
    for name, expected in ((".", "a"), ("b", "b"), ("d", "d")):
        full.filename = str(tmp_path / name)
        refusal = refusal_in(full, tmp_path)
        assert refusal is not None
        assert refusal.filename == str(tmp_path / expected)


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
