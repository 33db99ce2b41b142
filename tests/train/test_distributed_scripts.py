"""LAEP in scripts of several ranks: bf16 under tensor and expert parallelism, lists of parameters that are replaced."""

from __future__ import annotations

import contextlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from secateur.train.laep import LAEP
from support import distributed_runs as runs
from support.distributed_runs import Scenarios, sharded
from support.small_jobs import job
from support.small_trainers import laep, trainer_of
from support.tiny_models import random_tokens

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


def example(said: str) -> None:
    with open(said, "a") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.torchrun
def test_the_example_of_a_sharded_loop_runs_on_two_ranks_with_expert_parallelism(tmp_path: Path) -> None:
    ended = job(2, example, str(tmp_path / "said"), folder=tmp_path / "job")
    assert ended.is_good, ended.said
    assert (tmp_path / "said").read_text().count("pruned at step 20") == 1  # rank 0 says it
