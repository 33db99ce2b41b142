"""`kill -9` at any moment and --resume: the finished run equals the one that nobody stopped, to the last bit."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    run_in,
    strict,
    without_timings,
)

# {name: settings}. Windows of 4 steps end neither at a checkpoint (every 10) nor at the pruning (23). The learning rate
# does not end at 0, which would hide a step too many.
STEADY: dict[str, Any] = {"schedule": "constant_with_warmup", "save_steps": 10}
RUNS: dict[str, dict[str, Any]] = {
    "plain": STEADY,
    "control": {**STEADY, "control": True},
    "detector": {**STEADY, **LOOSE, "stable_windows": 4, "uniform": True},
    # everything that has a state of its own: biases, dropout's random numbers, accumulation, two prunings, bf16;
    # a checkpoint at the end of an epoch (20) and others within one
    "all": {
        "save_steps": 10,
        "preset": "deepseek_v3",
        "overrides": {"attention_dropout": 0.1},
        "balance": "bias",
        "balance_strength": 0.01,
        "accumulation": 2,
        "gradient_checkpointing": True,
        "prune": ("step=13 target_params=0.8", "step=26 target_params=0.85"),
        "precision": "bf16",
    },
    "odd steps": {**STEADY, "steps": 33, "log_steps": 3, "eval_steps": 12, "save_steps": 6},
}


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


STEP_END = "secateur.pretraining.run_log:RunLog.on_step_end"
# moment -> (the run, how it is killed there). Checkpoints at 10, 20, 30, 40; pruning at 23.
MOMENTS: dict[str, tuple[str, Kill]] = {
    "while the data is packed": ("plain", Kill("secateur.data.prepare:pack", 2)),
    "while the data is written": ("plain", Kill("secateur.data.prepare:atomic_write")),
    "before the first step": ("plain", Kill("secateur.pretraining.run:make_model")),
    "before the pruning": ("plain", Kill(STEP_END, 22)),
    "in the middle of the pruning, optimizer done and model not": (
        "plain",
        Kill("secateur.surgery.module:replace_parameters_", when="after"),
    ),
    "in the middle of the pruning, model done": ("plain", Kill("secateur.surgery.module:set_counts_", when="after")),
    "after the pruning, before it is recorded": (
        "plain",
        Kill("secateur.pretraining.run_folder:RunFolder.write_events", 2),
    ),
    "with half a line in the log": ("plain", Kill("secateur.pretraining.run_log:append_line", 9, how=half_of_the_line)),
    "between two domains of a validation": ("plain", Kill("transformers:Trainer.evaluation_loop", 2)),
    "with half a model in a checkpoint": (
        "plain",
        Kill("transformers.modeling_utils:safe_save_file", 3, how=half_of_the_file),
    ),
    "with half of the files of a checkpoint": ("plain", Kill("transformers:Trainer._save_scaler", 3)),
    "between a checkpoint and its seal": ("plain", Kill("secateur.train.training_log:seal", 3)),
    "while a checkpoint is sealed": ("plain", Kill("secateur.train.checkpoints:atomic_write", 3)),
    "while an old checkpoint is deleted": (
        "plain",
        Kill("transformers.trainer_utils:shutil.rmtree", 2, how=one_file_of_the_folder, where=is_checkpoint),
    ),
    "while the model is saved": ("plain", Kill("secateur.pretraining.run:os.rename")),
    "between the model and the summary": ("plain", Kill("secateur.pretraining.run:run_summary")),
    "before the report": ("plain", Kill("secateur.pretraining.run:write_report")),
    "in the control run": ("control", Kill(STEP_END, 40 + 27)),
    "within a window that the detector will count": ("detector", Kill(STEP_END, 11)),
    "between two prunings": ("all", Kill(STEP_END, 24)),
    "after a last validation that no interval asked for": ("odd steps", Kill("secateur.pretraining.run:run_summary")),
}
QUICK = ("in the middle of the pruning, optimizer done and model not",)


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


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["deepseek_v3", "gpt_oss", "qwen3_next"])  # latent, biased, linear attention
def test_every_kind_of_preset_goes_on_from_its_pruned_checkpoint(preset: str, tmp_path: Path, corpus: Path) -> None:
    times = {"steps": 8, "log_steps": 2, "eval_steps": 4, "save_steps": 2, "prune_at_step": 3, "batch_size": 2}
    settings = PretrainOptions(data=data_in(corpus), preset=preset, **{**SMALL, **times})
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert in_child(run, whole, settings) == 0
    assert in_child(run, out, settings, Kill(STEP_END, 6)) == -signal.SIGKILL
    assert in_child(go_on, out) == 0
    assert_same_run(out, whole)
    (event,) = strict(out / "events.json")
    assert event["oracle_max_abs_difference"] == 0.0
    assert event["parameters_after"] <= 0.67 * event["parameters_before"]


@pytest.mark.process
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out = tmp_path / "run"
    assert in_child(run, out, options(corpus, **RUNS["plain"]), Kill(STEP_END, 12)) == -signal.SIGKILL
    for steps in (3, 13, 4, 13):
        assert in_child(go_on, out, Kill(STEP_END, steps)) == -signal.SIGKILL
    assert in_child(go_on, out) == 0
    assert_same_run(out, uninterrupted("plain"))


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_that_lost_a_part_is_passed_over(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """Also where the part went after the seal: the one before it is taken."""
    out = tmp_path / "run"
    assert in_child(run, out, options(corpus, **RUNS["plain"]), Kill(STEP_END, 33)) == -signal.SIGKILL
    optimizer = out / "checkpoints" / "checkpoint-30" / "optimizer" / "__0_0.distcp"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert checkpoints.last_whole(out / "checkpoints") == out / "checkpoints" / "checkpoint-20"
    assert in_child(go_on, out) == 0
    assert_same_run(out, uninterrupted("plain"))


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert in_child(run, out, options(corpus, **RUNS["plain"]), Kill(STEP_END, 13)) == -signal.SIGKILL
    checkpoint = out / "checkpoints" / "checkpoint-10"
    (checkpoint / "optimizer" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    checkpoints.seal(checkpoint, strict(checkpoint / checkpoints.COMPLETE)["run"])
    said = tmp_path / "stderr"
    assert in_child(command_resume, out, stderr=said) == 2
    assert "optimizer/.metadata: its pickle names 'posix.mkdir'" in said.read_text()
    assert len(said.read_text().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.process
@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(tmp_path: Path, corpus: Path) -> None:
    for name, changes in (("one", {}), ("other", {"learning_rate": 1e-3})):
        settings = options(corpus, **RUNS["plain"], **changes)
        assert in_child(run, tmp_path / name, settings, Kill(STEP_END, 13)) == -signal.SIGKILL
    ours, theirs = (tmp_path / name / "checkpoints" / "checkpoint-10" for name in ("one", "other"))
    shutil.copytree(theirs, ours.with_name("checkpoint-20"))
    with pytest.raises(SecateurError, match=r"checkpoint-20: a checkpoint of another run"):
        resume(tmp_path / "one")
    assert ours.with_name("checkpoint-20").is_dir()


@pytest.mark.process
@pytest.mark.slow
def test_data_that_changed_after_it_was_prepared_is_not_read_again(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    settings = options(copy, **RUNS["plain"])
    out = tmp_path / "run"
    assert in_child(run, out, settings, Kill(STEP_END, 13)) == -signal.SIGKILL
    shutil.rmtree(copy)
    assert in_child(go_on, out) == 0
    expected = uninterrupted("plain") / "model" / "model.safetensors"
    assert (out / "model" / "model.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.process
@pytest.mark.slow
def test_going_on_does_not_need_the_folder_of_a_model_once_there_is_a_checkpoint(
    tmp_path: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = shutil.copytree(run_in(tmp_path_factory) / "model", tmp_path / "model")
    settings = options(corpus, model=str(model), save_steps=10, target_params=0.95)
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert in_child(run, whole, settings) == 0
    assert in_child(run, out, settings, Kill(STEP_END, 27)) == -signal.SIGKILL
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


def command_resume(out: Path, *more: str) -> None:
    program.write_report = light_report
    sys.argv = ["secateur", "pretrain", "--out", str(out), "--resume", "--quiet", *more]
    cli.main()


@pytest.mark.process
@pytest.mark.slow
def test_the_command_goes_on_with_the_same_options_and_refuses_others(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, said = tmp_path / "run", tmp_path / "stderr"
    settings = options(corpus, **RUNS["plain"])
    assert in_child(command, out, settings, Kill(STEP_END, 13)) == -signal.SIGKILL
    for words, name in (
        (["--steps", "50"], "--steps is 50"),
        (["--data", "elsewhere"], "--data is"),
        (["--set", "hidden_size=64"], "--set is"),
        (["--control"], "--control is True"),
        (["--alpha", "0.3"], "--alpha is 0.3"),
    ):
        assert in_child(command_resume, out, *words, stderr=said) == 2
        text = said.read_text()
        assert text.startswith(f"error: --resume: {name}")
        assert len(text.splitlines()) == 1
    assert in_child(command_resume, out, *arguments(settings), stderr=said) == 0
    assert said.read_text() == ""
    assert_same_run(out, uninterrupted("plain"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "nth", "last"),
    [
        pytest.param(20_000, 2, "checkpoint-10", id="no room for the model"),
        pytest.param(150_000, 3, "checkpoint-20", id="no room for the optimizer", marks=pytest.mark.slow),
        pytest.param(20_000, 1, "none", id="no checkpoint yet", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_names_the_checkpoint_and_the_last_whole_one_and_loses_nothing(
    size: int, nth: int, last: str, tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, said = tmp_path / "run", tmp_path / "stderr"
    limit = LimitFileSize("transformers:Trainer._save_checkpoint", nth, size)
    assert in_child(command, out, options(corpus, **RUNS["plain"]), limit, stderr=said) == 1
    text = said.read_text()
    assert f"checkpoint-{10 * nth} could not be written" in text
    assert f"The last whole checkpoint is {last}; make room and go on with --resume" in text
    assert len(text.splitlines()) == 1
    assert in_child(command_resume, out) == 0
    assert_same_run(out, uninterrupted("plain"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "nth", "size", "named"),
    [
        ("secateur.pretraining.run:_save_model", 1, 1000, r"model could not be written: .*Make room"),
        ("secateur.pretraining.run_log:append_line", 5, 500, r"(metrics|loads)\.jsonl"),
        ("secateur.pretraining.run_folder:RunFolder.write_events", 2, 1000, "File too large"),
        ("secateur.pretraining.run:write_json", 2, 1000, "File too large"),
    ],
)
def test_a_disk_that_is_full_elsewhere_is_named_too_and_loses_nothing(
    target: str, nth: int, size: int, named: str, tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out, said = tmp_path / "run", tmp_path / "stderr"
    limit = LimitFileSize(target, nth, size)
    assert in_child(command, out, options(corpus, **RUNS["plain"]), limit, stderr=said) == 1
    assert re.search(named, said.read_text())
    assert len(said.read_text().splitlines()) == 1
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


@pytest.mark.process
@pytest.mark.slow
def test_the_real_command_killed_from_outside_and_resumed_is_the_same_run(
    tmp_path: Path, corpus: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """No hook anywhere: two processes of the installed program, one of them shot when its log says step 25."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "secateur", "pretrain", "--out", str(out), "--quiet"]
    process = subprocess.Popen([*words, *arguments(options(corpus, **RUNS["plain"]))])
    log, deadline = out / "metrics.jsonl", time.monotonic() + 100
    while not (log.exists() and '"step": 25' in log.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    subprocess.run([*words, "--resume"], check=True)
    expected = uninterrupted("plain")
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    assert without_timings(lines(out / "metrics.jsonl")) == without_timings(lines(expected / "metrics.jsonl"))
    assert without_timings(strict(out / "events.json")) == without_timings(strict(expected / "events.json"))
