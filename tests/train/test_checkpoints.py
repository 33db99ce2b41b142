"""Checkpoints: a folder that was not finished is never picked up, and never one of another run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.train import checkpoints
from secateur.train.checkpoints import COMPLETE, is_whole, last_whole, remove_unfinished, seal, step_of

FILES = {"model.safetensors": 90, "optimizer/__0_0.distcp": 200, "optimizer/.metadata": 7, "trainer_state.json": 31}


def make(folder: Path, step: int, run: str = "a", *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, size in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"x" * size)
    if sealed:
        seal(checkpoint, run)
    return checkpoint


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert is_whole(make(tmp_path, 10))


def test_a_checkpoint_without_seal_is_not_whole(tmp_path: Path) -> None:
    assert not is_whole(make(tmp_path, 10, sealed=False))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_it_unfinished(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path, 10)
    (checkpoint / name).unlink()
    assert not is_whole(checkpoint)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_makes_it_unfinished(tmp_path: Path, name: str, change: int) -> None:
    checkpoint = make(tmp_path, 10)
    (checkpoint / name).write_bytes(b"x" * (FILES[name] + change))
    assert not is_whole(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b"{}",
        b'{"format": "secateur-checkpoint", "run": "a", "sizes": {}}',
        b'{"format": "secateur-checkpoint", "run": "a", "sizes": ["model.safetensors"]}',
        b'{"format": "another", "run": "a", "sizes": {"optimizer/__0_0.distcp": 200}}',
        b'{"format": "secateur-checkpoint", "sizes": {"optimizer/__0_0.distcp": 200}}',
        b'{"format": "secateur-checkpoint", "run": "a", "sizes": {"optimizer/__0_0.distcp": true}}',
        b'{"format": "secateur-checkpoint", "run": "a", "sizes": {"a name that no file has\\u0000": 200}}',
        b"[" * 100_000,
    ],
)
def test_a_seal_that_says_nothing_is_none(tmp_path: Path, content: bytes) -> None:
    checkpoint = make(tmp_path, 10)
    (checkpoint / COMPLETE).write_bytes(content)
    assert not is_whole(checkpoint)


def test_every_prefix_of_a_seal_is_refused(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 10)
    whole = (checkpoint / COMPLETE).read_bytes()
    for size in range(len(whole)):
        (checkpoint / COMPLETE).write_bytes(whole[:size])
        assert not is_whole(checkpoint), size


def test_sealing_again_replaces_the_seal(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 10)
    (checkpoint / "optimizer/__0_0.distcp").write_bytes(b"")
    seal(checkpoint, "a")
    assert is_whole(checkpoint)
    assert COMPLETE not in json.loads((checkpoint / COMPLETE).read_text())["sizes"]


def test_the_seal_comes_after_every_file_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, flushed = make(tmp_path, 10, sealed=False), []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert not (checkpoint / COMPLETE).exists() or flushed[-1].endswith(("checkpoint-10", tmp_path.name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    seal(checkpoint, "a")
    assert {str(checkpoint / name) for name in FILES} < set(flushed)


def test_a_disk_that_refuses_leaves_no_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, 10, sealed=False)

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        seal(checkpoint, "a")
    assert not is_whole(checkpoint)


def test_the_last_whole_one_has_the_most_steps_as_a_number(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        make(tmp_path, step)
    make(tmp_path, 300, sealed=False)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-100"


def test_no_whole_one_is_none(tmp_path: Path) -> None:
    make(tmp_path, 10, sealed=False)
    assert last_whole(tmp_path) is None
    assert last_whole(tmp_path / "missing") is None


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path, 10, run="a")
    make(tmp_path, 20, run="b")
    assert last_whole(tmp_path, "b") == tmp_path / "checkpoint-20"
    with pytest.raises(SecateurError, match=r"checkpoint-20.*another run"):
        last_whole(tmp_path, "a")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_since_is_named_where_a_run_would_go_on_from_it(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path, 10)
    (checkpoint / name).write_bytes(b"y" + (checkpoint / name).read_bytes()[1:])
    assert last_whole(tmp_path) == checkpoint  # it was finished, so nothing removes it
    with pytest.raises(SecateurError, match=rf"checkpoint-10/{name}: it was changed .*take .*checkpoint-10 away"):
        last_whole(tmp_path, "a")


def test_a_seal_with_the_digest_of_a_file_that_it_does_not_know_is_refused_by_its_own_name(tmp_path: Path) -> None:
    path = make(tmp_path, 10) / COMPLETE
    sealed = json.loads(path.read_text())
    sealed["sha256"]["rng_stateng_state.pth"] = "0"
    path.write_text(json.dumps(sealed))
    with pytest.raises(SecateurError, match=r"checkpoint-10/complete\.json: it has the SHA-256 of 'rng_stateng_state"):
        last_whole(tmp_path, run="a")


def test_of_the_largest_files_the_seal_holds_the_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SEALED", 90)
    sealed = json.loads((make(tmp_path, 10) / COMPLETE).read_text())
    assert (sealed["sizes"], sealed["sha256"].keys()) == (FILES, FILES.keys() - {"optimizer/__0_0.distcp"})
    assert last_whole(tmp_path, "a") == tmp_path / "checkpoint-10"


def test_a_seal_of_an_earlier_release_has_no_digests_and_is_one(tmp_path: Path) -> None:
    seal_of = make(tmp_path, 10) / COMPLETE
    earlier = json.loads(seal_of.read_text())
    del earlier["sha256"]
    seal_of.write_text(json.dumps(earlier))
    assert last_whole(tmp_path, "a") == tmp_path / "checkpoint-10"


def test_only_unfinished_checkpoints_are_removed(tmp_path: Path) -> None:
    whole, unfinished = make(tmp_path, 10), make(tmp_path, 20, sealed=False)
    foreign = [tmp_path / name for name in ("runs", "checkpoint-best", "checkpoint-", "my-checkpoint-30")]
    for folder in foreign:
        folder.mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    assert remove_unfinished(tmp_path) == [unfinished]
    assert whole.is_dir()
    assert all(folder.is_dir() for folder in foreign)
    assert (tmp_path / "checkpoint-40").exists()
    assert remove_unfinished(tmp_path / "missing") == []


def test_folders_with_other_names_are_never_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 10).rename(tmp_path / "checkpoint-best")
    assert last_whole(tmp_path) is None


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-", "other"])
def test_the_step_of_another_name_is_an_error(tmp_path: Path, name: str) -> None:
    assert step_of(tmp_path / "checkpoint-120") == 120
    with pytest.raises(SecateurError, match="checkpoint-STEP"):
        step_of(tmp_path / name)
