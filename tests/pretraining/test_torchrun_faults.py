"""When a rank of a job fails: one clear message, a whole checkpoint, and a restart that ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from secateur.pretraining.run_folder import RunFolder
from secateur.train import checkpoints
from support.faults import AnotherPlan, Kill, LimitFileSize, OnRank, Signal
from support.job_runs import STEP_END, Runs, keep_checkpoints
from support.long_tests import long
from support.small_jobs import Ended
from support.small_runs import assert_same_run, in_child

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]

LOST = "error: rank 0: lost contact with another rank; its own message or torchrun's summary says why; "
LOST += "go on with --resume\n"
STOPPED = r"error: interrupted by SIGTERM; checkpoint-(\d+) was written; go on with --resume\n"
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


@dataclass(frozen=True)
class Fault:
    """What happens to one rank of a job, and the checkpoint that is left; for an error, its status and message."""

    rank: int
    hook: Callable[[], None]
    left: str | None
    status: int = -signal.SIGKILL
    said: str = ""


# Every run goes on with what the one before left: checkpoints at every fourth step, a rearrangement at the fifth, the
# pruning at the sixth. The signal comes in the step of the rearrangement; the next one is the last.
FAULTS = {
    "before any checkpoint": Fault(1, Kill(STEP_END, 3), None),
    "no room from the start": Fault(1, LimitFileSize(WRITER, 1, 10_000), None, 1, ROOM.format(4, "none")),
    "in the pruning, between two layers": Fault(0, Kill(f"{SURGERY}:replace_parameters_", 4), "checkpoint-4"),
    "in the pruning, optimizer done and model not": Fault(1, Kill(f"{SURGERY}:set_counts_", 2), "checkpoint-4"),
    "another plan": Fault(
        1,
        AnotherPlan(),
        "checkpoint-4",
        2,
        r"error: plan: ranks \[1\] of 2 disagree with rank 0, nothing was changed; ",
    ),
    "SIGTERM": Fault(1, Signal("secateur.train.laep:LAEP.step", 1), "checkpoint-6", 143, STOPPED),
    "no room for its shard of the model": Fault(
        1,
        LimitFileSize("transformers:Trainer._save_checkpoint", 1, 10_000),
        "checkpoint-6",
        1,
        ROOM.format(8, "checkpoint-6"),
    ),
    "before its last file of a checkpoint": Fault(
        1, Kill("transformers:Trainer._save_rng_state", how=a_pause), "checkpoint-6"
    ),
    "in a checkpoint": Fault(1, Kill(WRITER, 2), "checkpoint-8"),
    "while the model is gathered": Fault(1, Kill("secateur.pretraining.run:save_whole"), "checkpoint-12"),
}
KILLED = [moment for moment, fault in FAULTS.items() if fault.status == -signal.SIGKILL]
FAILED = [moment for moment, fault in FAULTS.items() if fault.status in (1, 2)]


@pytest.fixture(scope="module")
def faulty(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Ended, str | None]]]:
    """A run that ended with each of the faults in turn, and then by itself; how it ended and what it left each time."""
    out = tmp_path_factory.mktemp("faulty") / "run"
    begin, found = {"kind": "over 2", "ep": 2}, {}
    for moment, fault in FAULTS.items():
        ended = runs.start(out, 2, OnRank(fault.rank, fault.hook), **begin)
        found[moment] = ended, last_whole(out)
        begin = {}
    found["none"] = runs.start(out, 2, keep_checkpoints), last_whole(out)
    return out, found


def test_a_job_that_fails_at_any_moment_ends_as_if_it_had_not(runs: Runs, faulty: Any) -> None:
    out, found = faulty
    assert {moment: left for moment, (_, left) in found.items()} == {
        **{moment: fault.left for moment, fault in FAULTS.items()},
        "none": "checkpoint-12",
    }
    assert found["none"][0] == Ended((0, 0), "")
    assert_same_run(out, runs.finished("over 2", 2, ep=2))


@pytest.mark.parametrize("moment", KILLED)
def test_a_job_that_loses_a_rank_says_so_once(faulty: Any, moment: str) -> None:
    (ended, _), rank = faulty[1][moment], FAULTS[moment].rank
    assert ended.statuses[rank] == -signal.SIGKILL
    assert ended.said == ("" if rank == 0 else LOST)


@pytest.mark.parametrize("fault", FAILED)
def test_a_job_with_a_rank_that_fails_says_so_in_one_line(faulty: Any, fault: str) -> None:
    ended, _ = faulty[1][fault]
    assert ended.statuses[0] == FAULTS[fault].status
    assert re.match(FAULTS[fault].said, ended.said), ended.said
    assert len(ended.said.splitlines()) == 1, ended.said


def test_sigterm_on_one_rank_ends_all_after_the_same_step_with_a_checkpoint(faulty: Any) -> None:
    ended, left = faulty[1]["SIGTERM"]
    assert ended.statuses == (143, 143)
    (step,) = re.findall(STOPPED, ended.said)
    assert left == f"checkpoint-{step}"


def test_a_second_job_in_the_folder_of_a_running_one_is_refused(runs: Runs) -> None:
    out = runs.cut_back("over 2", 2, ep=2)
    with RunFolder(out).locked():
        ended = runs.start(out, 2)
    assert ended.statuses[0] == 2
    assert ended.said == f"error: {out}: another process is running in this folder\n"
    assert last_whole(out) == "checkpoint-8"


def test_bad_data_of_a_job_is_one_message_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    out = tmp_path / "run"
    words = [*runs.words(out, "over 2", ep=2), "--data", str(tmp_path / "blank.txt")]
    ended = runs.job(2, words)
    assert ended.statuses[0] == 2
    assert re.fullmatch(r"error: .*blank\.txt.*: found no text.*\n", ended.said), ended.said
    assert not out.exists()


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """torchrun's own program, with its own options before the script's: the status, what it said, what its ranks said.

    In a child, as its ranks are, which have imported everything: a new interpreter takes five seconds to.
    """

    def run(*words: str | Path) -> tuple[int, str, str]:
        logs, said = tmp_path / "logs", tmp_path / "said"
        command = ["--standalone", "--nproc-per-node", "2", "--run-path", "--start-method", "forkserver"]
        command += ["--redirects", "2", "--log-dir", str(logs)]
        status = in_child(run_torchrun, [*command, *map(str, words)], stderr=said)
        return status, said.read_text(), "".join(path.read_text() for path in sorted(logs.rglob("stderr.log")))

    return run


def run_torchrun(words: list[str]) -> None:
    from torch.distributed import run as program

    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]  # that of the tests is up
    program.main(words)


def lines_of_ours(said: str) -> list[str]:
    """On a busy machine torchrun may end rank 0 before that one sees that it has lost the other."""
    return [f"{line}\n" for line in said.splitlines() if line.startswith("error:")]


FAULTY = Path(__file__).parents[1] / "support/faulty_command.py"


def test_torchrun_restarts_the_job_which_goes_on_by_itself(
    runs: Runs, tmp_path: Path, torchrun: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "run"
    status, said, by_ranks = torchrun("--max-restarts", "2", FAULTY, "1", *runs.words(out, "over 2", ep=2))
    assert status == 0, said
    assert set(lines_of_ours(by_ranks)) <= {LOST, ENDED}
    assert "(exitcode: -9) local_rank: 1" in said, "no rank was lost, so nothing was restarted"
    assert "Traceback" not in by_ranks
    expected = runs.finished("over 2", 2, ep=2)
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()


@long
def test_torchrun_blames_the_rank_that_was_killed(runs: Runs, tmp_path: Path) -> None:
    """The command itself, whose ranks are new interpreters."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FAULTY), "1"]
    path = os.pathsep.join([str(FAULTY.parents[1]), os.environ.get("PYTHONPATH", "")])  # of the helpers it imports
    ended = subprocess.run(
        [*command, *runs.words(out, "over 2", ep=2)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=300,
    )
    assert ended.returncode == 1
    assert lines_of_ours(ended.stderr) in ([LOST], [ENDED], [])
    summary = ended.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", summary)
    assert "Signal 9 (SIGKILL)" in summary
    assert last_whole(out) == "checkpoint-4"
