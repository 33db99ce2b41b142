"""`kill -9` at any moment and --resume: the finished run equals the one that nobody stopped, to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur import cli
from secateur.errors import SecateurError
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run import resume, run_pretraining
from secateur.train import checkpoints
from support.faults import Kill, LimitFileSize
from support.fork_server import context
from support.long_tests import long
from support.small_runs import (
    LOOSE,
    SMALL,
    arguments,
    assert_same_run,
    corpus_in,
    data_in,
    in_child,
    light_report,
    lines,
    options,
    strict,
    without_timings,
)

# {name: settings}. Windows end neither at a checkpoint nor at a pruning. The learning rate does not end at 0, which
# would hide a step too many.
STEADY: dict[str, Any] = {"schedule": "constant_with_warmup"}
RUNS: dict[str, dict[str, Any]] = {
    # a checkpoint at every fourth step, so that what a kill breaks is in the next one; a pruning for each kill in one
    "plain": STEADY
    | {"steps": 40, "log_steps": 2, "eval_steps": 20, "save_steps": 4, "window_steps": 3}
    | {"prune": tuple(f"step={step} target_params=0.9" for step in (26, 30, 34))},
    "control": STEADY | {"steps": 12, "log_steps": 2, "eval_steps": 6, "save_steps": 6, "prune_at_step": 7}
    | {"control": True},
    "detector": STEADY | LOOSE
    | {"steps": 20, "eval_steps": 10, "save_steps": 5, "window_steps": 3, "uniform": True},
    # everything that has a state of its own: biases, dropout's random numbers, accumulation, two prunings, bf16;
    # a checkpoint at the end of an epoch (10) and others within one
    "all": {
        "batch_size": 8,
        "steps": 18,
        "eval_steps": 10,
        "save_steps": 5,
        "preset": "deepseek_v3",
        "overrides": {"attention_dropout": 0.1},
        "balance": "bias",
        "balance_strength": 0.01,
        "accumulation": 2,
        "gradient_checkpointing": True,
        "prune": ("step=7 target_params=0.8", "step=13 target_params=0.85"),
        "precision": "bf16",
    },
    "odd steps": STEADY | {"steps": 9, "log_steps": 3, "eval_steps": 6, "save_steps": 6, "prune_at_step": 5},
}  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_in(tmp_path_factory)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that nobody stopped, made once a session."""

    def make(name: str) -> Path:
        out = tmp_path_factory.getbasetemp() / f"uninterrupted-{name}"
        if not out.exists():
            assert in_child(run, out, options(corpus_in(tmp_path_factory), **RUNS[name])) == 0
        return out

    return make


def run(out: Path, settings: PretrainOptions, *hooks: Callable[[], None]) -> None:
    program.write_report = light_report
    for hook in hooks:
        hook()
    run_pretraining(settings, out)


def go_on(out: Path, *hooks: Callable[[], None]) -> None:
    program.write_report = light_report
    for hook in hooks:
        hook()
    resume(out)


def half_of_the_file(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """For a writer whose second argument is a path: leave half of what it would write."""
    write(*args, **kwargs)
    path = Path(args[1])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_of_the_line(write: Callable[..., None], path: Path, value: Any) -> None:
    text = json.dumps(value)
    with path.open("a") as file:
        file.write(text[: len(text) // 2])


def one_file_of_the_folder(remove: Callable[..., None], folder: Any, *args: Any, **kwargs: Any) -> None:
    next(path for path in Path(folder).iterdir() if path.is_file()).unlink()


def is_checkpoint(folder: Any, *args: Any, **kwargs: Any) -> bool:
    return Path(folder).name.startswith("checkpoint-")


def is_unfinished_model(folder: Any, *args: Any) -> bool:
    return Path(folder).name == ".model-unfinished"


STEP_END = "secateur.pretraining.run_log:RunLog.on_step_end"
# moment -> (how the run is killed there, the checkpoint that is left). Every run goes on with what the one before left.
KILLS: dict[str, tuple[Kill, int | None]] = {
    "while the data is packed": (Kill("secateur.data.prepare:pack", 2), None),
    "while the data is written": (Kill("secateur.data.prepare:atomic_write"), None),
    "before the first step": (Kill("secateur.pretraining.run:make_model"), None),
    "before the first checkpoint": (Kill(STEP_END, 3), None),
    "at the same step again": (Kill(STEP_END, 3), None),
    "with half a model in a checkpoint": (
        Kill("transformers.modeling_utils:safe_save_file", 2, how=half_of_the_file),
        4,
    ),
    "with half of the files of a checkpoint": (Kill("transformers:Trainer._save_scaler", 2), 8),
    "between a checkpoint and its seal": (Kill("secateur.train.training_log:seal", 2), 12),
    "between two domains of a validation": (Kill("transformers:Trainer.evaluation_loop", 2), 16),
    "while a checkpoint is sealed": (Kill("secateur.train.checkpoints:atomic_write", 2), 20),
    "while an old checkpoint is deleted": (
        Kill("transformers.trainer_utils:shutil.rmtree", 1, how=one_file_of_the_folder, where=is_checkpoint),
        20,
    ),
    "in the middle of a pruning, optimizer done and model not": (
        Kill("secateur.surgery.module:replace_parameters_", when="after"),
        24,
    ),
    "in the middle of a pruning, model done": (Kill("secateur.surgery.module:set_counts_", 2, when="after"), 28),
    "after a pruning, before it is recorded": (
        Kill("secateur.pretraining.run_folder:RunFolder.write_events", 3),
        32,
    ),
    "with half a line in the log": (Kill("secateur.pretraining.run_log:append_line", 5, how=half_of_the_line), 36),
    "while the model is saved": (Kill("secateur.pretraining.run:os.rename", where=is_unfinished_model), 40),
    "between the model and the summary": (Kill("secateur.pretraining.run:run_summary"), 40),
    "before the report": (Kill("secateur.pretraining.run:write_report"), None),  # when the checkpoints are gone
}
# moment -> (the run, how it is killed there), of runs that have what the one above has not
MOMENTS: dict[str, tuple[str, Kill]] = {
    "in the control run": ("control", Kill(STEP_END, 12 + 8)),
    "within a window that the detector will count": ("detector", Kill(STEP_END, 11)),
    "between two prunings": ("all", Kill(STEP_END, 11)),
    "after a last validation that no interval asked for": ("odd steps", Kill("secateur.pretraining.run:run_summary")),
}
QUICK = ("after a last validation that no interval asked for",)


def last_whole(out: Path) -> int | None:
    found = checkpoints.last_whole(out / "checkpoints")
    return None if found is None else checkpoints.step_of(found)


@pytest.mark.process
@pytest.mark.slow
def test_a_run_killed_at_every_moment_ends_as_if_it_had_not_been(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, left = tmp_path / "run", []
    for moment, (kill, last) in KILLS.items():
        if not left:
            assert in_child(run, out, options(corpus, **RUNS["plain"]), kill) == -signal.SIGKILL, moment
        else:
            assert in_child(go_on, out, kill) == -signal.SIGKILL, moment
        assert not (out / "report.json").exists()
        left.append((moment, last_whole(out)))
        assert left[-1][1] == last, left
    assert in_child(go_on, out) == 0
    assert_same_run(out, uninterrupted("plain"))


@pytest.mark.process
@pytest.mark.parametrize(
    "moment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    moment: str, tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    name, kill = MOMENTS[moment]
    out = tmp_path / "run"
    assert in_child(run, out, options(corpus, **RUNS[name]), kill) == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert in_child(go_on, out) == 0
    assert_same_run(out, uninterrupted(name))


@pytest.fixture
def killed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of the run "plain" as the command left it that was shot after step 13: checkpoints 8 and 12."""
    out = tmp_path_factory.getbasetemp() / "killed-plain"
    if not out.exists():
        settings = options(corpus_in(tmp_path_factory), **RUNS["plain"])
        assert in_child(command, out, settings, Kill(STEP_END, 13)) == -signal.SIGKILL
    return Path(shutil.copytree(out, tmp_path / "run"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(  # biased, linear attention; the latent one is that of "all"
    "preset", [pytest.param("deepseek_v3", marks=long), "gpt_oss", "qwen3_next"]
)
def test_every_kind_of_preset_goes_on_from_its_pruned_checkpoint(preset: str, tmp_path: Path, corpus: Path) -> None:
    times = {"steps": 6, "log_steps": 2, "eval_steps": 4, "save_steps": 2, "prune_at_step": 3, "batch_size": 2}
    settings = PretrainOptions(data=data_in(corpus), preset=preset, **{**SMALL, **times})
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert in_child(run, whole, settings) == 0
    assert in_child(run, out, settings, Kill(STEP_END, 5)) == -signal.SIGKILL
    assert in_child(go_on, out) == 0
    assert_same_run(out, whole)
    (event,) = strict(out / "events.json")
    assert event["oracle_max_abs_difference"] == 0.0
    assert event["parameters_after"] <= 0.67 * event["parameters_before"]


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_that_lost_a_part_is_passed_over(killed: Path, uninterrupted: Callable[[str], Path]) -> None:
    """Also where the part went after the seal: the one before it is taken."""
    optimizer = killed / "checkpoints" / "checkpoint-12" / "optimizer" / "__0_0.distcp"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert last_whole(killed) == 8
    assert in_child(go_on, killed) == 0
    assert_same_run(killed, uninterrupted("plain"))


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = killed / "checkpoints" / "checkpoint-12"
    (checkpoint / "optimizer" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    checkpoints.seal(checkpoint, strict(checkpoint / checkpoints.COMPLETE)["run"])
    said = tmp_path / "stderr"
    assert in_child(command_resume, killed, stderr=said) == 2
    assert "optimizer/.metadata: its pickle names 'posix.mkdir'" in said.read_text()
    assert len(said.read_text().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(killed: Path, tmp_path: Path, corpus: Path) -> None:
    settings = options(corpus, **RUNS["plain"], learning_rate=1e-3)
    assert in_child(run, tmp_path / "other", settings, Kill(STEP_END, 5)) == -signal.SIGKILL
    theirs = killed / "checkpoints" / "checkpoint-20"
    shutil.copytree(tmp_path / "other" / "checkpoints" / "checkpoint-4", theirs)
    with pytest.raises(SecateurError, match=r"checkpoint-20/complete.json: of a checkpoint of another run"):
        resume(killed)
    assert theirs.is_dir()


@pytest.mark.process
@pytest.mark.slow
def test_going_on_does_not_need_the_folder_of_a_model_once_there_is_a_checkpoint(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    model = shutil.copytree(uninterrupted("odd steps") / "model", tmp_path / "model")
    settings = options(corpus, **RUNS["odd steps"], model=str(model), target_params=0.95)
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert in_child(run, whole, settings) == 0
    assert in_child(run, out, settings, Kill(STEP_END, 8)) == -signal.SIGKILL
    shutil.rmtree(model)
    assert in_child(go_on, out) == 0
    assert_same_run(out, whole)


@pytest.mark.process
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, uninterrupted: Callable[[str], Path]) -> None:
    out = shutil.copytree(uninterrupted("plain"), tmp_path / "run")
    (out / "report.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert in_child(go_on, out) == 0
    assert (out / "report.json").read_bytes() == (uninterrupted("plain") / "report.json").read_bytes()
    (out / "report.json").unlink()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [None, "notes.txt", "config.json"])
def test_a_folder_without_a_run_has_nothing_to_resume(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / content).write_text("{}")
    before = list(tmp_path.iterdir())
    with pytest.raises(SecateurError, match="nothing to resume"):
        resume(tmp_path)
    with pytest.raises(SecateurError, match="nothing to resume"):
        resume(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == before


def test_a_second_process_in_the_folder_of_a_running_one_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, refusals = tmp_path / "run", []

    def second(*args: object) -> None:
        for start in (lambda: resume(out), lambda: run_pretraining(options(corpus), out)):
            with pytest.raises(SecateurError) as caught:
                start()
            refusals.append(str(caught.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "make_model", second)
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(options(corpus), out)
    assert "another process is running in this folder" in refusals[0]
    assert "expected a new or empty folder" in refusals[1]


def command(out: Path, settings: PretrainOptions, *hooks: Callable[[], None]) -> None:
    """The command line itself, with a light report."""
    program.write_report = light_report
    for hook in hooks:
        hook()
    sys.argv = ["secateur", "pretrain", "--out", str(out), "--quiet", *arguments(settings)]
    cli.main()


def command_resume_after(out: Path, hook: Callable[[], None]) -> None:
    hook()
    command_resume(out)


def command_resume(out: Path, *more: str) -> None:
    program.write_report = light_report
    sys.argv = ["secateur", "pretrain", "--out", str(out), "--resume", "--quiet", *more]
    cli.main()


@contextlib.contextmanager
def moved_away(path: Path) -> Iterator[None]:
    path.rename(path.with_name("elsewhere"))
    try:
        yield
    finally:
        path.with_name("elsewhere").rename(path)


@pytest.mark.process
@pytest.mark.slow
def test_the_command_goes_on_with_the_same_options_and_refuses_others(
    killed: Path, tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """It does not read the data again, which is gone meanwhile."""
    said = tmp_path / "stderr"
    for words, name in (
        (["--steps", "50"], "--steps is 50"),
        (["--data", "elsewhere"], "--data is"),
        (["--set", "hidden_size=64"], "--set is"),
        (["--control"], "--control is True"),
        (["--alpha", "0.3"], "--alpha is 0.3"),
    ):
        assert in_child(command_resume, killed, *words, stderr=said) == 2
        text = said.read_text()
        assert text.startswith(f"error: --resume: {name}")
        assert len(text.splitlines()) == 1
    with moved_away(corpus):
        assert in_child(command_resume, killed, *arguments(options(corpus, **RUNS["plain"])), stderr=said) == 0
    assert said.read_text() == ""
    assert_same_run(killed, uninterrupted("plain"))


SAVE = "transformers:Trainer._save_checkpoint"
CHECKPOINT = "checkpoint-{} could not be written.*The last whole checkpoint is {}; make room and go on with --resume"
# what there is no room for -> (at which call, bytes; what is named). Every run goes on with what the one before left.
FULL: dict[str, tuple[LimitFileSize, str]] = {
    "the settings": (LimitFileSize("secateur.pretraining.run:write_json", 2, 1000), "File too large"),
    "the first checkpoint": (LimitFileSize(SAVE, 1, 20_000), CHECKPOINT.format(4, "none")),
    "the model of a checkpoint": (LimitFileSize(SAVE, 2, 20_000), CHECKPOINT.format(8, "checkpoint-4")),
    "the optimizer of a checkpoint": (LimitFileSize(SAVE, 2, 200_000), CHECKPOINT.format(12, "checkpoint-8")),
    "the log": (LimitFileSize("secateur.pretraining.run_log:append_line", 5, 500), r"(metrics|loads)\.jsonl"),
    "a pruning": (LimitFileSize("secateur.pretraining.run_folder:RunFolder.write_events", 2, 1000), "File too large"),
    "the result": (
        LimitFileSize("secateur.pretraining.run:_save_model", 1, 1000),
        r"model could not be written: .*Make room",
    ),
}


@pytest.mark.process
@pytest.mark.slow
def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, said, is_begun = tmp_path / "run", tmp_path / "stderr", False
    for what, (limit, named) in FULL.items():
        if is_begun:
            status = in_child(command_resume_after, out, limit, stderr=said)
        else:
            status = in_child(command, out, options(corpus, **RUNS["plain"]), limit, stderr=said)
        is_begun = True
        assert status == 1, (what, said.read_text())
        assert re.search(named, said.read_text()), (what, said.read_text())
        assert len(said.read_text().splitlines()) == 1, (what, said.read_text())
    assert in_child(command_resume, out) == 0
    assert_same_run(out, uninterrupted("plain"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a file system needs root")
    found = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"cannot mount a small file system here: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.process
@pytest.mark.slow
def test_a_small_file_system_that_fills_up_loses_nothing(
    small_disk: Path, tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, said = small_disk / "run", tmp_path / "stderr"
    assert in_child(command, out, options(corpus, **RUNS["plain"]), stderr=said) == 1
    text = said.read_text()
    assert len(text.splitlines()) == 1
    assert "No space left" in text or "could not be written" in text
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert in_child(command_resume, out) == 0
    assert_same_run(out, uninterrupted("plain"))


def installed_command(words: list[str]) -> None:
    sys.argv = ["secateur", *words]
    cli.main()


@pytest.mark.process
@pytest.mark.slow
def test_the_real_command_killed_from_outside_and_resumed_is_the_same_run(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """No hook anywhere. The first process is shot when its log says step 10; the other one is a new interpreter."""
    out, name = tmp_path / "run", "detector"
    words = ["pretrain", "--out", str(out), "--quiet"]
    process = context().Process(target=installed_command, args=([*words, *arguments(options(corpus, **RUNS[name]))],))
    process.start()
    log, deadline = out / "metrics.jsonl", time.monotonic() + 100
    while not (log.exists() and '"step": 10' in log.read_text()) and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    subprocess.run([sys.executable, "-m", "secateur", *words, "--resume"], check=True)
    expected = uninterrupted(name)
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    assert without_timings(lines(out / "metrics.jsonl")) == without_timings(lines(expected / "metrics.jsonl"))
    assert without_timings(strict(out / "events.json")) == without_timings(strict(expected / "events.json"))
