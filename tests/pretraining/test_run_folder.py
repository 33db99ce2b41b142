"""The run folder: who may use it, and how its logs are put back to the state of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.pretraining.run_folder import RunFolder, append_line, write_json
from support.small_runs import in_child, lines


def test_a_new_folder_and_an_empty_one_are_new(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        folder = RunFolder(tmp_path / name)
        folder.require_new()
        with folder.made(), folder.locked():
            folder.require_new()  # its lock does not count
            assert [path.name for path in folder.path.iterdir()] == [".lock"]
        assert folder.path.is_dir()


def test_a_folder_with_files_is_refused_and_a_run_in_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SecateurError, match=r"--out .*empty folder, found files in it$"):
        RunFolder(tmp_path).require_new()
    (tmp_path / "run.json").touch()
    with pytest.raises(SecateurError, match="--resume"):
        RunFolder(tmp_path).require_new()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SecateurError, match="found a file"):
        RunFolder(tmp_path / "file").require_new()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(SecateurError, match=r"--out .*file/run: cannot be made"),
        RunFolder(tmp_path / "file/run").made(),
    ):
        raise AssertionError


def test_a_start_that_fails_takes_its_new_folder_away_but_no_old_one(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for folder in (tmp_path / "a" / "new", old):
        with pytest.raises(KeyError), RunFolder(folder).made(), RunFolder(folder).locked():
            raise KeyError
    assert not (tmp_path / "a" / "new").exists()
    assert list(old.iterdir()) == []


def test_a_start_that_fails_late_keeps_what_is_in_its_folder(tmp_path: Path) -> None:
    def begin_and_fail() -> None:
        (tmp_path / "new" / "run.json").touch()
        raise KeyError

    with pytest.raises(KeyError), RunFolder(tmp_path / "new").made():
        begin_and_fail()
    assert (tmp_path / "new" / "run.json").exists()


def lock_and_die(folder: Path) -> None:
    with RunFolder(folder).locked():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


def lock_in_vain(folder: Path) -> None:
    with pytest.raises(SecateurError, match="another process"), RunFolder(folder).locked():
        raise AssertionError


@pytest.mark.process
def test_a_second_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked():
        assert in_child(lock_in_vain, tmp_path) == 0
        with pytest.raises(SecateurError, match="another process"), RunFolder(tmp_path).locked():
            raise AssertionError
        RunFolder(tmp_path).require_new()  # the lock alone does not fill a folder
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    assert in_child(lock_and_die, tmp_path) == -9
    with RunFolder(tmp_path).locked():
        pass


def test_a_lock_whose_file_was_replaced_in_between_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def owner_leaves(file: object, operation: int) -> None:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()

    monkeypatch.setattr(fcntl, "flock", owner_leaves)
    with pytest.raises(SecateurError, match="another process"), RunFolder(tmp_path).locked():
        raise AssertionError


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"config": 3}', '{"config": null}', "\ufffd"])
def test_a_folder_without_settings_has_nothing_to_resume(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("utf-16") if content == "\ufffd" else content.encode())
    with pytest.raises(SecateurError, match=r"run\.json"):
        RunFolder(tmp_path).read_run()


def filled(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        append_line(folder.metrics, {"kind": "train", "step": step, "seconds": step / 4})
        append_line(folder.loads, {"step": step, "layers": {"0": [step]}})
        losses = {"validation_loss": step / 2, "validation_loss_by_domain": {"a": step / 2}}
        append_line(folder.metrics, {"kind": "eval", "step": step, "tokens": step, "seconds": step / 4, **losses})
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of one after step 20, of a run that went on to step 30."""
    folder = filled(tmp_path)
    folder.run.write_text('{"config": {}}')
    (folder.checkpoints / "checkpoint-20").mkdir(parents=True)
    folder.note_digests(folder.checkpoints / "checkpoint-20")
    return folder.checkpoints / "checkpoint-20"


def test_what_comes_after_a_checkpoint_is_nothing_to_it(tmp_path: Path, checkpoint: Path) -> None:
    folder = RunFolder(tmp_path)
    append_line(folder.metrics, {"kind": "train", "step": 31, "seconds": 9.0})
    folder.check_digests(checkpoint)
    folder.rewind(20)
    folder.check_digests(checkpoint)
    (checkpoint / "run-digests.json").unlink()  # as an earlier release left it
    folder.run.unlink()
    folder.check_digests(checkpoint)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "loads.jsonl"])
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "changed"])
def test_a_record_that_is_not_the_one_of_the_checkpoint_is_named(
    tmp_path: Path, checkpoint: Path, name: str, is_gone: bool
) -> None:
    path = tmp_path / name
    text = path.read_text().replace(": 10", ": 11", 1) + " "
    path.unlink()
    if not is_gone:
        path.write_text(text)
    with pytest.raises(SecateurError, match=rf"{name}: it was changed, or taken away, since .*checkpoint-20"):
        RunFolder(tmp_path).check_digests(checkpoint)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_rewinding_keeps_the_lines_up_to_the_step(tmp_path: Path, step: int, kept: list[int]) -> None:
    folder = filled(tmp_path)
    before = folder.loads.read_text()
    assert folder.rewind(step) == max([0.0, *(one / 4 for one in kept)])
    assert [line["step"] for line in lines(folder.loads)] == kept
    assert [line["step"] for line in lines(folder.metrics)] == [one for one in kept for _ in range(2)]
    assert before.startswith(folder.loads.read_text())


@pytest.mark.parametrize("cut", [b'{"step": 40, "lay', b'{"step": 40}\n{', b"\xc3"])
def test_a_line_that_a_kill_cut_short_goes_and_the_rest_stays(tmp_path: Path, cut: bytes) -> None:
    folder = filled(tmp_path)
    with folder.loads.open("ab") as file:
        file.write(cut)
    folder.rewind(30)
    assert [line["step"] for line in lines(folder.loads)] == [10, 20, 30]


def test_rewinding_a_run_that_wrote_nothing_makes_empty_logs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.rewind(0) == 0.0
    assert folder.metrics.read_text() == folder.loads.read_text() == ""


def test_the_validation_after_a_step_is_found_once_it_is_whole(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    assert folder.eval_at(20) == {"validation_loss": 10.0, "validation_loss_by_domain": {"a": 10.0}}
    assert folder.eval_at(25) is None
    assert RunFolder(tmp_path / "none").eval_at(20) is None


def test_logs_are_strict_json(tmp_path: Path) -> None:
    for write in (append_line, write_json):
        with pytest.raises(ValueError, match="JSON compliant"):
            write(tmp_path / "file", {"loss": float("nan")})


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/metrics\.jsonl"):
        append_line(tmp_path / "missing" / "metrics.jsonl", {})


def test_the_control_run_is_a_folder_of_the_same_form(tmp_path: Path) -> None:
    assert vars(RunFolder(tmp_path).control) == vars(RunFolder(tmp_path / "control"))


def test_json_files_are_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
