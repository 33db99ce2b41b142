"""SIGTERM while a model is fine-tuned, and a kill after its result was written: the same folder in the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.files.work_folder import NOTE, place_of_work
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.run import WHAT
from support.faults import Kill, Signal
from support.small_finetunes import files_of, run, text_folder, text_options
from support.small_runs import in_child

pytestmark = pytest.mark.process
STEP_END = "secateur.finetuning.trainer:FinetuneLog.on_step_end"
LOGGED = {"steps": 7, "log_steps": 3}  # the fourth step, after which it ends, is none of a log


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("signals"))


def begin(root: Path, out: Path, options: FinetuneOptions, *hooks: Callable[[], None]) -> None:
    for hook in hooks:
        hook()
    run(root, out, options)


def losses_of(out: Path) -> Any:
    return json.loads((out / "finetune.json").read_text())["losses"]


def test_after_sigterm_it_goes_on_from_the_step_that_it_finished(root: Path, tmp_path: Path) -> None:
    """Also where no checkpoint was asked for; the means that are logged span the interruption.

    Without what the checkpoint is of, it does not.
    """
    out, whole, options = tmp_path / "out", tmp_path / "whole", text_options(root, **LOGGED)
    run(root, whole, options)
    assert in_child(begin, root, out, options, Signal(STEP_END, 3)) == -signal.SIGTERM
    assert not out.exists()
    assert [path.name for path in place_of_work(out, WHAT).glob("checkpoint-*")] == ["checkpoint-4"]
    note = place_of_work(out, WHAT) / NOTE
    note.rename(tmp_path / NOTE)
    with pytest.raises(SecateurError, match=r"asked\.json is gone, so nothing says what .*checkpoint-4 is of"):
        run(root, out, options, resume=True)
    (tmp_path / NOTE).rename(note)
    assert run(root, out, options, resume=True)["resumed_after_step"] == 4
    assert files_of(out) == files_of(whole)
    assert losses_of(out) == losses_of(whole)


@pytest.mark.slow
def test_one_that_was_killed_when_its_result_was_there_is_finished_by_the_same_command(
    root: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", text_options(root, steps=2, save_steps=1)
    kill = Kill("secateur.files.work_folder:Work.remove")
    assert in_child(begin, root, out, options, kill) == -signal.SIGKILL
    before = files_of(out)
    assert place_of_work(out, WHAT).is_dir()
    run(root, out, options)
    assert files_of(out) == before
    assert not place_of_work(out, WHAT).exists()
