"""`secateur pretrain` on several processes is the same run as on one, and goes on from its checkpoints on any number.

Runs are made once a session. That a killed job goes on is in test_torchrun_faults.py, as is torchrun itself: here the
processes only have the environment that torchrun gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from support.job_runs import Runs
from support.long_tests import long
from support.small_jobs import Ended
from support.small_runs import lines, strict, without_timings

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


CLOSE = {"rtol": 0.0, "atol": 1e-5}


def assert_close_runs(one: Path, other: Path) -> None:
    """Equal plans and counts, and every number to 1e-5."""
    assert (one / "loads.jsonl").read_bytes() == (other / "loads.jsonl").read_bytes()
    assert strict(one / "plan.json") == strict(other / "plan.json")
    assert_close(lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl"))
    assert_close(strict(one / "events.json"), strict(other / "events.json"))
    assert_close(strict(one / "summary.json"), strict(other / "summary.json"))
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    torch.testing.assert_close(*weights, **CLOSE)
    assert (one / "model" / "config.json").read_bytes() == (other / "model" / "config.json").read_bytes()


def assert_close(one: Any, other: Any) -> None:
    flat, expected = (dict(_flat(without_timings(value))) for value in (one, other))
    assert flat.keys() == expected.keys()
    for path, value in flat.items():
        assert value == (pytest.approx(expected[path], abs=1e-5) if isinstance(value, float) else expected[path]), path


def _flat(value: Any, path: str = "") -> Any:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(part, f"{path}/{key}")
    else:
        yield path, value


def optimizer_state(run: Path, folder: Path) -> dict[str, Any]:
    """Of the last checkpoint, put together from the parts of all ranks."""
    dcp_to_torch_save(run / "checkpoints" / "checkpoint-12" / "optimizer", folder / "optimizer.pt")
    return torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]


@pytest.mark.parametrize(
    ("kind", "ranks", "split"),
    [
        ("over 2", 2, {"ep": 2}),
        ("two heads", 4, {"fsdp": 2, "tp": 2}),  # further splits: tests/train/test_distributed_laep.py
        ("loss", 2, {"ep": 2}),
        ("bias, accumulated", 2, {"ep": 2}),
    ],
)
def test_a_run_on_several_processes_is_the_run_on_one(
    kind: str, ranks: int, split: dict[str, int], runs: Runs, tmp_path: Path
) -> None:
    alone, run = runs.finished("loss of two" if kind == "loss" else kind), runs.finished(kind, ranks, **split)
    assert_close_runs(run, alone)
    one, other = (optimizer_state(out, tmp_path) for out in (run, alone))
    torch.testing.assert_close(one, other, **CLOSE)
    assert _names(run) == _names(alone)
    assert _names(run / "model") == _names(alone / "model")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BEFORE, AFTER = 5, 11  # the pruning, with a checkpoint on the same side of it


@pytest.mark.parametrize(
    ("step", "ranks", "split"),
    [
        (BEFORE, 1, {"ep": 1}),
        pytest.param(AFTER, 4, {"ep": 4}, marks=long),  # fewer and more: the others here, and test_distributed_laep.py
    ],
)
def test_a_killed_job_goes_on_with_other_numbers_of_processes(
    step: int,
    ranks: int,
    split: dict[str, int],
    runs: Runs,
) -> None:
    out = runs.killed("kept in order", 2, step, ep=2)
    assert runs.start(out, ranks, **split) == Ended((0,) * ranks, "")
    assert_close_runs(out, runs.finished("kept in order"))


def test_a_run_that_one_process_began_goes_on_with_two(runs: Runs) -> None:
    out = runs.cut_back("kept in order")
    assert runs.start(out, 2, ep=2) == Ended((0, 0), "")
    assert_close_runs(out, runs.finished("kept in order"))


def test_an_expert_parallel_size_that_the_pruned_counts_do_not_allow_is_named_and_nothing_is_lost(runs: Runs) -> None:
    out = runs.killed("odd counts", 1, AFTER)
    layers = strict(out / "events.json")[0]["layers"]
    layer, count = next((name, one["experts_after"]) for name, one in layers.items() if one["experts_after"] % 2)
    before = _content(out)
    ended = runs.start(out, 2, ep=2)
    assert ended.statuses[0] == 2
    assert ended.said == f"error: --ep 2: layer {layer} has {count} experts, expected a multiple\n"
    assert _content(out) == before


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("ranks", "split", "named"),
    [
        (1, {}, ["--ep 2", "found 1 process;", "torchrun --nproc-per-node 2", "--resume takes --fsdp, --ep and --tp"]),
        (3, {"ep": 1}, ["--batch-size 4", "multiple of the 3"]),
        (2, {"fsdp": 4}, ["--fsdp 4", "expected 4 processes, found 2"]),
    ],
)
def test_going_on_with_processes_that_do_not_fit_is_refused_by_name(
    ranks: int, split: dict[str, int], named: list[str], runs: Runs
) -> None:
    out = runs.cut_back("over 2", 2, ep=2)
    ended = runs.start(out, ranks, **split)
    assert ended.statuses[0] == 2
    assert all(part in ended.said for part in named), ended.said
    assert len(ended.said.splitlines()) == 1
