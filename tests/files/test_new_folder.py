"""One folder, or two together: under their names lies nothing, or all of it, whenever the process dies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.new_folder import check_free, roll_back, written_beside, written_together
from support.crash_points import CrashPoint, changes_of, forked


def pair(root: Path) -> None:
    """What `apply --undo` does with its two folders."""
    roll_back(root / "out", root / "side")
    check_free(root / "out")
    check_free(root / "side", "--undo")
    with written_together(root / "out", root / "side") as (beside, other):
        (beside / "more").mkdir()
        (beside / "more" / "a").write_text("a" * 100)
        (other / "b").write_text("b" * 100)


def in_it(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() if path.is_file() else "" for path in root.rglob("*")}


BOTH = {"out": "", "out/more": "", "out/more/a": "a" * 100, "side": "", "side/b": "b" * 100}


@pytest.mark.process
def test_two_folders_killed_anywhere_are_both_there_or_both_made_by_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    changes = changes_of(root, lambda: pair(root))
    assert in_it(root) == BOTH
    half = 0
    for nth in range(1, changes + 1):
        shutil.rmtree(root)
        root.mkdir()
        assert forked(lambda: pair(root), CrashPoint(root, nth)) == -9
        half += (root / "side").exists() and not (root / "out").exists()
        if not (root / "out").exists():
            pair(root)
        else:
            roll_back(root / "out", root / "side")  # nothing to take back: what is whole stays
        assert in_it(root) == BOTH, nth
    assert half, "no kill fell between the two names"


@pytest.mark.parametrize("number", [0, 1])
def test_a_folder_that_another_one_has_taken_the_place_of_gets_no_name(tmp_path: Path, number: int) -> None:
    def fill() -> None:
        with written_together(tmp_path / "out", tmp_path / "side") as both:
            shutil.rmtree(both[number])
            both[number].mkdir()

    with pytest.raises(OSError, match="it was taken away while it was written to"):
        fill()
    assert in_it(tmp_path) == {}


def test_one_folder_that_another_one_has_taken_the_place_of_gets_no_name(tmp_path: Path) -> None:
    def fill() -> None:
        with written_beside(tmp_path / "out") as beside:
            shutil.rmtree(beside)
            beside.mkdir()

    with pytest.raises(OSError, match="it was taken away while it was written to"):
        fill()
    assert in_it(tmp_path) == {}


def test_a_second_name_that_is_taken_meanwhile_takes_the_first_one_back(tmp_path: Path) -> None:
    def fill(out: str, side: str) -> None:
        with written_together(tmp_path / out, tmp_path / side):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(OSError, match="filled by another process meanwhile"):
        fill("out", "side")
    assert in_it(tmp_path) == {"out": "", "out/theirs": "theirs"}
    with pytest.raises(OSError, match="filled by another process meanwhile"):
        fill("new", "out")
    assert in_it(tmp_path) == {"out": "", "out/theirs": "theirs"}


def test_only_the_folder_that_was_asked_for_is_taken_back(tmp_path: Path) -> None:
    """A note is a file that anybody may have written: it removes nothing that the command does not name."""
    for name in ("mine", "side", f".out.{'0' * 16}.partial"):
        (tmp_path / name).mkdir()
    note = tmp_path / ".out.pair.json"
    number = (tmp_path / f".out.{'0' * 16}.partial").stat().st_ino
    note.write_text(f'{{"side": "{tmp_path}/mine", "partial": ".out.{"0" * 16}.partial", "number": {number}}}')
    roll_back(tmp_path / "out", tmp_path / "side")
    note.write_text(f'{{"side": "{tmp_path}/side", "partial": "mine", "number": {number}}}')
    roll_back(tmp_path / "out", tmp_path / "side")
    assert all((tmp_path / name).is_dir() for name in ("mine", "side"))
    note.write_text(f'{{"side": "{tmp_path}/side", "partial": ".out.{"0" * 16}.partial", "number": {number}}}')
    roll_back(tmp_path / "out", tmp_path / "side")
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "side").exists()
    note.write_text("{")
    with pytest.raises(SecateurError, match=r"pair\.json"):
        roll_back(tmp_path / "out", tmp_path / "side")


def test_what_other_libraries_wrote_is_flushed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("secateur.files.atomic.fsync_file", lambda path: flushed.append(path.name))
    with written_beside(tmp_path / "out") as beside:
        (beside / "more").mkdir()
        (beside / "more" / "a").write_text("a")
    assert flushed == ["a"]


@pytest.mark.process
def test_a_file_killed_anywhere_leaves_nothing_that_the_next_start_does_not_remove(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    changes = changes_of(root, lambda: atomic_write(root / "file", "new" * 100))
    for nth in range(1, changes + 1):
        shutil.rmtree(root)
        root.mkdir()
        (root / "file").write_text("old")
        (root / ".file.of-mine").write_text("mine")
        assert forked(lambda: atomic_write(root / "file", "new" * 100), CrashPoint(root, nth)) == -9
        assert (root / "file").read_text() in ("old", "new" * 100)
        atomic_write(root / "file", "new" * 100)
        assert in_it(root) == {"file": "new" * 100, ".file.of-mine": "mine"}


def test_what_a_living_process_writes_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    def pieces() -> list[bytes]:
        atomic_write(tmp_path / "file", "of another")  # while this one is open
        return [b"mine"]

    atomic_write(tmp_path / "file", (piece for make in (pieces,) for piece in make()))
    assert in_it(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("partial", ["../victim", "victim"])
def test_a_note_that_names_another_folder_takes_nothing_away(tmp_path: Path, partial: str) -> None:
    for name in ("here/side", "victim", "here/victim"):
        (tmp_path / name).mkdir(parents=True)
    here = tmp_path.resolve() / "here"
    number = (here / partial).stat().st_ino
    note = {"side": str(here / "side"), "partial": partial, "number": number}
    (here / ".out.pair.json").write_text(json.dumps(note))
    roll_back(here / "out", here / "side")
    assert {path.name for path in here.iterdir()} == {"side", "victim", ".out.pair.json"}
