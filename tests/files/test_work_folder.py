"""The folder of unfinished work: of one process at a time, with a note of what it is that no kill leaves wrong."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.files.work_folder import LOCK, NOTE, Work, as_noted, differing, place_of_work, work_folder

ASKED = {"data": ("a", "b"), "layers": {1: 2.5}}
ANY = dict[str, Any]
KEPT = {NOTE, "a", "b", "c"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return place_of_work(tmp_path / "out")


def fill(work: Work[dict[str, Any]]) -> None:
    work.note(ASKED)
    (work.path / "b").write_text("b")
    for name in "ac":
        (work.path / name).mkdir()
        (work.path / name / "file").touch()


BEGIN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from secateur.files.work_folder import work_folder
with work_folder(Path(sys.argv[1]), dict, "taken") as work:
    work.note({"data": ("a", "b"), "layers": {1: 2.5}})
    (work.path / "a").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_what_a_killed_process_left_is_there_with_what_it_was_asked_for(path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", BEGIN_AND_DIE, str(path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert (path / LOCK).exists()  # the file, which nobody holds any more
    with work_folder(path, ANY, "taken") as work:
        assert work.before == {"data": ["a", "b"], "layers": {"1": 2.5}} == as_noted(ASKED)
        assert [entry.name for entry in work.entries()] == [NOTE, "a"]
    assert {entry.name for entry in path.iterdir()} == {NOTE, "a"}


def test_a_second_process_is_refused_and_changes_nothing(path: Path) -> None:
    with work_folder(path, ANY, "taken") as work:
        fill(work)
        for restart in (False, True):
            with (
                pytest.raises(SecateurError, match="it is mine"),
                work_folder(path, ANY, "it is mine", restart=restart),
            ):
                raise AssertionError
        assert {entry.name for entry in work.entries()} == KEPT
        with pytest.raises(SecateurError, match="it is mine"), work_folder(path, ANY, "it is mine"):
            raise AssertionError  # the one that was refused has not freed the lock


def test_a_lock_whose_folder_was_taken_away_in_between_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def owner_leaves(descriptor: int, operation: int) -> None:
        shutil.rmtree(path)

    monkeypatch.setattr("fcntl.flock", owner_leaves)
    with pytest.raises(SecateurError, match="taken"), work_folder(path, ANY, "taken"):
        raise AssertionError


def test_an_empty_folder_goes_and_a_restart_begins_with_one(path: Path) -> None:
    with work_folder(path, ANY, "taken") as work:
        assert (work.before, work.entries()) == (None, [])
        fill(work)
    with work_folder(path, ANY, "taken", restart=True) as work:
        assert (work.before, work.entries()) == (None, [])
    assert not path.exists()


@pytest.mark.parametrize(("take_away", "is_noted"), [(Work.clear, False), (Work.remove, True)])
def test_of_work_that_is_thrown_away_the_note_goes_first_and_of_finished_work_last(
    take_away: Callable[[Work[Any]], None], is_noted: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with work_folder(path, ANY, "taken") as work:
        fill(work)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", refuse)
            with pytest.raises(OSError, match="Input/output"):
                take_away(work)
        assert (path / NOTE).is_file() == is_noted
        take_away(work)
    assert not path.exists()


def test_a_damaged_note_is_named_and_a_restart_helps(path: Path) -> None:
    path.mkdir()
    (path / NOTE).write_text('{"a": 1')
    with pytest.raises(SecateurError, match=r"asked\.json: .*use --restart"), work_folder(path, ANY, "taken"):
        raise AssertionError
    assert (path / NOTE).is_file()
    with work_folder(path, ANY, "taken", restart=True) as work:
        assert work.before is None


def test_names_of_what_differs_are_those_of_either_side() -> None:
    assert differing({"same": 1, "was": 2, "gone": 3}, {"same": 1, "was": 4, "new": 5}) == ["was", "new", "gone"]
    assert differing({"a": [1]}, {"a": [1]}) == []
