"""SIGTERM while a run trains: the step is finished, a checkpoint written, and the resumed run is the same run."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur import cli
from secateur.errors import SecateurError
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run import resume, run_pretraining
from secateur.pretraining.run_folder import RunFolder
from secateur.surgery.events import read_events
from secateur.train import checkpoints
from support.faults import Signal, replace
from support.small_runs import arguments, assert_same_run, corpus_in, files_of, in_child, light_report, options

# short, and the steps that are interrupted are neither of a log nor of a checkpoint; the pruning is at 9
QUICK = {"steps": 12, "log_steps": 4, "eval_steps": 8, "save_steps": 12, "prune_at_step": 9, "window_steps": 3}
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
    assert_every_second_counted(out)


def assert_every_second_counted(out: Path) -> None:
    """Between two lines lie all their steps, also those before a checkpoint: steps an interval = rate x seconds."""
    lines = [line for line in map(json.loads, (out / "metrics.jsonl").open()) if line["kind"] == "train"]
    for before, line in zip([{"step": 0, "seconds": 0.0, "tokens": 0}, *lines], lines, strict=False):
        tokens = line["tokens_per_second"] * (line["seconds"] - before["seconds"])
        assert tokens == pytest.approx(line["tokens"] - before["tokens"])


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
    assert in_child(run, out, options(corpus, **QUICK), Signal(STEP_END, 12)) == -signal.SIGTERM
    assert checkpoints.last_whole(out / "checkpoints") == out / "checkpoints" / "checkpoint-12"
    assert in_child(go_on, out) == 0
    assert_same_run(out, whole)


class Gone:
    """Take a folder away before the tenth step ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> None:
        replace(STEP_END, self._counted)

    def _counted(self, original: Callable[..., None]) -> Callable[..., None]:
        calls = 0

        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 10:
                shutil.rmtree(self.path)
            original(*args, **kwargs)

        return call


def fail_with(said: Path, expected: str, target: Callable[..., None], *values: Any) -> None:
    assert in_child(target, *values, stderr=said) == 2
    assert expected in said.read_text()
    assert len(said.read_text().splitlines()) == 1


@pytest.mark.process
@pytest.mark.slow
def test_data_that_go_while_a_run_uses_them_are_missed_and_made_again(
    tmp_path: Path, corpus: Path, whole: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "stderr"
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    words = ["--out", str(out), *arguments(options(copy, **QUICK))]
    fail_with(
        said,
        "it was changed while it was in use: it is gone (No such file or directory); take ",
        command,
        words,
        Gone(out / "data"),
    )
    text = next((copy / "prose").glob("*"))
    before = text.read_bytes()
    text.write_bytes(before + b"more of it\n")
    again = ["--out", str(out), "--resume"]
    fail_with(said, "data: it is missing, and the text that it was made from is not the same any more", command, again)
    text.write_bytes(before)
    assert in_child(command, again) == 0
    found, expected = files_of(out), files_of(whole)
    assert {name for name in found if found[name] != expected[name]} <= {"run.json", "data/data.json", "report.json",
                                                                         "model/report.json"}  # fmt: skip
    assert found.keys() == expected.keys()


@pytest.mark.process
@pytest.mark.slow
def test_a_folder_that_goes_while_a_run_is_in_it_is_missed(tmp_path: Path, corpus: Path) -> None:
    """And no checkpoint makes it again, which the next start would refuse."""
    out, said = tmp_path / "run", tmp_path / "stderr"
    words = ["--out", str(out), *arguments(options(corpus, **QUICK))]
    fail_with(said, "run.json: it is gone; the folder of the run was removed", command, words, Gone(out))
    assert not out.exists()


def test_a_folder_of_a_run_without_its_settings_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SecateurError, match=r"files in it; they are of a run whose run\.json is gone"):
        RunFolder(tmp_path).require_new()
    with pytest.raises(SecateurError, match="nothing to resume, there is no such folder"):
        RunFolder(tmp_path / "never").read_run()


@pytest.mark.process
def test_events_are_in_the_same_order_from_a_checkpoint_whose_keys_were_sorted(whole: Path, tmp_path: Path) -> None:
    events = [event for event, _ in read_events(whole / "events.json")]
    (tmp_path / "sorted.json").write_text(json.dumps([event.to_json() for event in events], sort_keys=True))
    resumed = [event for event, _ in read_events(tmp_path / "sorted.json")]
    RunFolder(tmp_path).write_events(resumed)
    assert (tmp_path / "events.json").read_bytes() == (whole / "events.json").read_bytes()
