"""SIGTERM while a run trains: the step is finished, a checkpoint written, and the resumed run is the same run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur import cli
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run import resume, run_pretraining
from secateur.train import checkpoints
from support.faults import Signal
from support.small_runs import arguments, assert_same_run, corpus_in, in_child, light_report, options

# short, and the steps that are interrupted are neither of a log nor of a checkpoint; the pruning is at 9
QUICK = {"steps": 16, "log_steps": 4, "eval_steps": 8, "save_steps": 16, "prune_at_step": 9, "window_steps": 3}
QUICK |= {"schedule": "constant_with_warmup", "batch_size": 2}
STEP_END = "secateur.pretraining.run_log:RunLog.on_step_end"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    out = tmp_path_factory.mktemp("sigterm") / "whole"
    assert in_child(run, out, options(corpus, **QUICK)) == 0
    return out


def run(out: Path, settings: PretrainOptions, *hooks: Callable[[], None], **how: bool) -> None:
    program.write_report = light_report
    for hook in hooks:
        hook()
    run_pretraining(settings, out, **how)


def command(words: list[str], *hooks: Callable[[], None]) -> None:
    program.write_report = light_report
    for hook in hooks:
        hook()
    sys.argv = ["secateur", "pretrain", "--quiet", *words]
    cli.main()


def go_on(out: Path) -> None:
    program.write_report = light_report
    resume(out)


@pytest.mark.process
def test_the_run_that_goes_on_is_the_one_that_nobody_stopped(tmp_path: Path, corpus: Path, whole: Path) -> None:
    """Also what is logged, though the means of its losses began before the checkpoint."""
    out, said = tmp_path / "run", tmp_path / "stderr"
    words = ["--out", str(out), *arguments(options(corpus, **QUICK))]
    assert in_child(command, words, Signal(STEP_END, 5), stderr=said) == 128 + signal.SIGTERM
    assert said.read_text() == "error: interrupted by SIGTERM; checkpoint-6 was written; go on with --resume\n"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-6"]
    again = ["--out", str(out), "--resume"]
    assert in_child(command, again, Signal(STEP_END, 4), stderr=said) == 128 + signal.SIGTERM
    assert checkpoints.last_whole(out / "checkpoints") == out / "checkpoints" / "checkpoint-11"
    assert in_child(command, again) == 0
    assert_same_run(out, whole)


@pytest.mark.process
@pytest.mark.slow
def test_without_the_option_it_leaves_at_once(tmp_path: Path, corpus: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "stderr"
    words = ["--out", str(out), "--no-checkpoint-on-sigterm", *arguments(options(corpus, **QUICK))]
    assert in_child(command, words, Signal(STEP_END, 5), stderr=said) == 128 + signal.SIGTERM
    assert said.read_text() == "error: interrupted by SIGTERM; go on with --resume\n"
    assert not list((out / "checkpoints").glob("checkpoint-*"))


@pytest.mark.process
def test_a_function_hands_the_signal_on_to_whoever_had_it(tmp_path: Path, corpus: Path, whole: Path) -> None:
    """Here nobody: the process dies of it, as it would have without the run, and the checkpoint is there."""
    out = tmp_path / "run"
    assert in_child(run, out, options(corpus, **QUICK), Signal(STEP_END, 16)) == -signal.SIGTERM
    assert checkpoints.last_whole(out / "checkpoints") == out / "checkpoints" / "checkpoint-16"
    assert in_child(go_on, out) == 0
    assert_same_run(out, whole)
