"""When a rank of a job fails: one clear message, a whole checkpoint, and a restart that ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.pretraining.run_folder import RunFolder
from secateur.train import checkpoints
from support.faults import AnotherPlan, Kill, LimitFileSize, OnRank, Signal
from support.job_runs import STEP_END, Runs, keep_checkpoints
from support.long_tests import long
from support.small_jobs import Ended
from support.small_runs import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]

LOST = "error: rank 0: lost contact with another rank; its own message or torchrun's summary says why; "
LOST += "go on with --resume\n"
ENDED = "error: interrupted by SIGTERM; go on with --resume\n"  # the step ends in which the other is missed
SURGERY = "secateur.train.distributed.surgery"
WRITER = "torch.distributed.checkpoint.filesystem:FileSystemWriter.write_data"
ROOM = r"error: \S+/checkpoint-{} could not be written: \S+: rank 1: .*too large.* The last whole checkpoint is {}; "


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


def last_whole(out: Path) -> str | None:
    found = checkpoints.last_whole(out / "checkpoints")
    return found.name if found else None


def a_pause(*args: Any) -> None:
    """In which another rank could take the checkpoint for a whole one."""
    time.sleep(1)


# moment -> (the rank, what kills it, the checkpoint that is left). Every run goes on with what the one before left:
# checkpoints at every sixth step, a rearrangement at the eighth, the pruning at the ninth.
KILLED: dict[str, tuple[int, Kill, str | None]] = {
    "before any checkpoint": (1, Kill(STEP_END, 4), None),
    "in the pruning, between two layers": (0, Kill(f"{SURGERY}:replace_parameters_", 4), "checkpoint-6"),
    "in the pruning, optimizer done and model not": (1, Kill(f"{SURGERY}:set_counts_", 2), "checkpoint-6"),
    "in a checkpoint": (1, Kill(WRITER), "checkpoint-6"),
    "before its last file of a checkpoint": (
        1,
        Kill("transformers:Trainer._save_rng_state", how=a_pause),
        "checkpoint-6",
    ),
    "while the model is gathered": (1, Kill("secateur.pretraining.run:save_whole"), "checkpoint-18"),
}


def test_a_job_that_loses_a_rank_at_any_moment_ends_as_if_it_had_not(runs: Runs, tmp_path: Path) -> None:
    out, begin = tmp_path / "run", {"kind": "over 2", "ep": 2}
    for moment, (rank, kill, left) in KILLED.items():
        ended = runs.start(out, 2, OnRank(rank, kill), **begin)
        assert ended.statuses[rank] == -signal.SIGKILL, moment
        assert ended.said == ("" if rank == 0 else LOST), moment
        assert last_whole(out) == left, moment
        begin = {}
    assert runs.start(out, 2, keep_checkpoints) == Ended((0, 0), "")
    assert_same_run(out, runs.finished("over 2", 2, ep=2))


def test_sigterm_on_one_rank_ends_all_after_the_same_step_with_a_checkpoint(runs: Runs, tmp_path: Path) -> None:
    """In the step after the rearrangement and before the pruning, which is neither logged nor saved otherwise."""
    out = tmp_path / "run"
    ended = runs.start(out, 2, OnRank(1, Signal("secateur.train.laep:LAEP.step", 8)), kind="over 2", ep=2)
    assert ended.statuses == (143, 143)
    (step,) = re.findall(
        r"error: interrupted by SIGTERM; checkpoint-(\d+) was written; go on with --resume\n", ended.said
    )
    assert last_whole(out) == f"checkpoint-{step}"
    assert runs.start(out, 2, keep_checkpoints) == Ended((0, 0), "")
    assert_same_run(out, runs.finished("over 2", 2, ep=2))


# fault of rank 1 -> (its hook, the exit status, the message, the checkpoint that is left)
FAILED = {
    "no room from the start": (LimitFileSize(WRITER, 1, 10_000), 1, ROOM.format(6, "none"), None),
    "another plan": (
        AnotherPlan(),
        2,
        r"error: plan: ranks \[1\] of 2 disagree with rank 0, nothing was changed; ",
        "checkpoint-6",
    ),
    "no room for its shard of the model": (
        LimitFileSize("transformers:Trainer._save_checkpoint", 1, 10_000),
        1,
        ROOM.format(12, "checkpoint-6"),
        "checkpoint-6",
    ),
}


def test_a_job_with_a_rank_that_fails_says_so_in_one_line_and_loses_nothing(runs: Runs, tmp_path: Path) -> None:
    out, begin = tmp_path / "run", {"kind": "over 2", "ep": 2}
    for fault, (hook, status, message, left) in FAILED.items():
        ended = runs.start(out, 2, OnRank(1, hook), **begin)
        assert ended.statuses[0] == status, fault
        assert re.match(message, ended.said), (fault, ended.said)
        assert len(ended.said.splitlines()) == 1, (fault, ended.said)
        assert last_whole(out) == left, fault
        begin = {}
    assert runs.start(out, 2, keep_checkpoints) == Ended((0, 0), "")
    assert_same_run(out, runs.finished("over 2", 2, ep=2))


def test_a_second_job_in_the_folder_of_a_running_one_is_refused(runs: Runs) -> None:
    out = runs.killed("over 2", 2, 15, ep=2)
    with RunFolder(out).locked():
        ended = runs.start(out, 2)
    assert ended.statuses[0] == 2
    assert ended.said == f"error: {out}: another process is running in this folder\n"
    assert last_whole(out) == "checkpoint-12"


def test_bad_data_of_a_job_is_one_message_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    out = tmp_path / "run"
    words = [*runs.words(out, "over 2", ep=2), "--data", str(tmp_path / "blank.txt")]
    ended = runs.job(2, words)
    assert ended.statuses[0] == 2
    assert re.fullmatch(r"error: .*blank\.txt.*: found no text.*\n", ended.said), ended.said
    assert not out.exists()


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """torchrun itself, with its own options before the program's."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        path = os.pathsep.join([str(FAULTY.parents[1]), os.environ.get("PYTHONPATH", "")])  # of the helpers it imports
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(
            [*command, *map(str, words)], capture_output=True, text=True, check=False, env=environment, timeout=300
        )

    return run


def lines_of_ours(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """On a busy machine torchrun may end rank 0 before that one sees that it has lost the other."""
    return [f"{line}\n" for line in ended.stderr.splitlines() if line.startswith("error:")]


FAULTY = Path(__file__).parents[1] / "support/faulty_command.py"


def test_torchrun_restarts_the_job_which_goes_on_by_itself(
    runs: Runs, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "run"
    ended = torchrun("--max-restarts", "2", FAULTY, "1", *runs.words(out, "over 2", ep=2))
    assert ended.returncode == 0, ended.stderr
    assert set(lines_of_ours(ended)) <= {LOST, ENDED}
    assert "(exitcode: -9) local_rank: 1" in ended.stderr, "no rank was lost, so nothing was restarted"
    assert "Traceback" not in ended.stderr
    expected = runs.finished("over 2", 2, ep=2)
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()


@long
def test_torchrun_blames_the_rank_that_was_killed(
    runs: Runs, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "run"
    ended = torchrun(FAULTY, "1", *runs.words(out, "over 2", ep=2))
    assert ended.returncode == 1
    assert lines_of_ours(ended) in ([LOST], [ENDED], [])
    summary = ended.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", summary)
    assert "Signal 9 (SIGKILL)" in summary
    assert last_whole(out) == "checkpoint-6"
