"""LAEP in scripts of several ranks: bf16 under tensor and expert parallelism, lists of parameters that are replaced."""

from __future__ import annotations

import contextlib
import json
import logging
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from secateur.errors import SecateurError
from secateur.train.distributed import patience
from secateur.train.laep import LAEP
from support import distributed_runs as runs
from support.distributed_runs import Scenarios, sharded
from support.small_jobs import job
from support.small_trainers import laep, trainer_of
from support.tiny_models import random_tokens, tiny_model

TWO = Scenarios(__name__, 2)
EXAMPLE = Path(__file__).parents[2] / "examples" / "sharded_loop.py"


def train(model: Any, **laep: Any) -> dict[str, Any]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = LAEP(model, optimizer, at_step=2, target_params=0.8, window_steps=2, **laep)
    held = list(model.parameters())
    for index in range(4):
        tokens = random_tokens(4, 8, seed=index)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        event = pruner.step()
        optimizer.zero_grad()
        if event is not None:
            replaced = event.replaced
            held = [replaced.get(parameter, parameter) for parameter in held]
            assert replaced
    assert not pruner.events[0].replaced
    same = all(one is other for one, other in zip(held, model.parameters(), strict=True))
    return {"difference": pruner.events[0].oracle_max_abs_difference, "list is right": same}


def in_bf16(**laep: Any) -> Any:
    return train(sharded("qwen3_moe", dtype=torch.bfloat16, tp_size=2, ep_size=2), **laep)


TWO.add("bf16, tp 2, ep 2", lambda: in_bf16(rearrange=False))
TWO.add("bf16, tp 2, ep 2, rearranged", in_bf16)
TWO.add("fsdp 2", lambda: train(sharded("qwen3_moe", fsdp_size=2)))


class Asks(TrainerCallback):
    """Wants a checkpoint after a step, on one rank or on all."""

    def __init__(self, step: int, *, on_rank: int | None = None) -> None:
        self.step, self.on_rank = step, on_rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.on_rank in (None, dist.get_rank()):
            control.should_save = True


def saves(*, first: bool, on_rank: int | None = None) -> Any:
    """What a Trainer that is trained twice leaves of a checkpoint that another callback wants."""
    folder = runs.folder / f"saves-{first}"
    said: list[str] = []
    callback, asks = laep(on_message=said.append), Asks(3, on_rank=on_rank)
    callbacks = (asks, callback) if first else (callback, asks)
    trainer = trainer_of(folder, *callbacks, ddp_backend="gloo", max_steps=4)
    trainer.train()
    trainer.callback_handler.remove_callback(asks)
    trainer.train()
    dist.barrier()
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return {
        "steps": [event.step for event in callback.events],
        "files": sorted(path.name for path in (folder / "checkpoint-3").glob("rng*")),
        "window": state["stateful_callbacks"]["LAEPCallback"]["attributes"]["pruner_state"]["watch"]["open_window"],
        "said": [line for line in said if "was asked for by a callback after" in line],
    }


TWO.add("one rank wants a checkpoint", lambda: saves(first=True, on_rank=1))
TWO.add("a later callback wants a checkpoint", lambda: saves(first=False))


def alone(call: str) -> Any:
    """What rank 0 says when it calls before the other, which comes much later."""
    patience.SECONDS = 0.2
    said = Said()
    logging.getLogger("secateur").addHandler(said)
    model = tiny_model("mixtral").train()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = LAEP(model, optimizer, prunings=[], window_steps=1)
    ddp(input_ids=random_tokens(2, 8), labels=random_tokens(2, 8)).loss.backward()
    optimizer.step()
    if dist.get_rank() == 1:
        time.sleep(1.5)
    pruner.step() if call == "step" else pruner.state_dict()
    logging.getLogger("secateur").removeHandler(said)
    patience.SECONDS = 600.0
    return said.lines


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


TWO.add("step on one rank", lambda: alone("step"))
TWO.add("state_dict on one rank", lambda: alone("state_dict"))


def of_a_part() -> str:
    """The refusal of a DDP over one of two processes."""
    model = tiny_model("mixtral").train()
    groups = [dist.new_group([rank]) for rank in range(2)]
    ddp = DistributedDataParallel(model, process_group=groups[dist.get_rank()])
    LAEP(model, torch.optim.SGD(model.parameters(), lr=0.1), at_step=1, target_params=0.8)
    try:
        ddp(input_ids=random_tokens(2, 8))
    except SecateurError as error:
        return str(error)
    return "not refused"


TWO.add("DDP of a part", of_a_part)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TWO.play(tmp_path_factory.mktemp("two"))


@pytest.mark.torchrun
@pytest.mark.parametrize("split", ["bf16, tp 2, ep 2", "bf16, tp 2, ep 2, rearranged", "fsdp 2"])
def test_a_pruning_passes_its_self_check_and_the_event_says_which_parameters_are_new(two: Any, split: str) -> None:
    for found in two[split]:
        assert found["list is right"]
        assert found["difference"] is not None


@pytest.mark.torchrun
def test_a_checkpoint_that_one_rank_wants_is_written_by_all_and_a_second_training_goes_on(two: Any) -> None:
    for found in two["one rank wants a checkpoint"]:
        assert found["steps"] == [2]
        assert found["files"] == ["rng_state_0.pth", "rng_state_1.pth"]
        assert found["window"] is not None
        assert found["said"] == []


@pytest.mark.torchrun
def test_a_checkpoint_that_a_later_callback_wants_is_whole_without_the_open_window(two: Any) -> None:
    for rank, found in enumerate(two["a later callback wants a checkpoint"]):
        assert found["steps"] == [2]
        assert found["files"] == ["rng_state_0.pth", "rng_state_1.pth"]
        assert found["window"] is None
        assert len(found["said"]) == (rank == 0)


@pytest.mark.torchrun
@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_a_rank_that_waits_for_others_says_in_one_line_what_all_must_call(two: Any, call: str) -> None:
    first, second = two[f"{call} on one rank"]
    assert len(first) == 1
    assert f"rank 0 of 2 has waited 0 s in LAEP.{call}() for the other ranks: all of them must call it" in first[0]
    assert second == []


@pytest.mark.torchrun
def test_a_ddp_over_a_part_of_the_processes_is_refused_at_the_first_forward(two: Any) -> None:
    for found in two["DDP of a part"]:
        assert "averages over 1 of the 2 processes of the job" in found


def example(said: str) -> None:
    with open(said, "a") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.torchrun
def test_the_example_of_a_sharded_loop_runs_on_two_ranks_with_expert_parallelism(tmp_path: Path) -> None:
    ended = job(2, example, str(tmp_path / "said"), folder=tmp_path / "job")
    assert ended.is_good, ended.said
    assert (tmp_path / "said").read_text().count("pruned at step 20") == 1  # rank 0 says it
