"""Many checks in one start of several ranks: a `Scenarios` of a test module collects functions that all ranks run.

FOUR = Scenarios(__name__, 4)

@FOUR.scenario
def something() -> Any:            # runs on every rank; what it returns must be JSON
    ...

@pytest.fixture(scope="module")
def four(tmp_path_factory): return FOUR.play(tmp_path_factory.mktemp("four"))

def test_something(four):
    for result in four["something"]:  # of each rank
        ...
"""

from __future__ import annotations

import importlib
import json
import math
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.train.distributed.fsdp import reshard_
from support.small_jobs import job
from support.tiny_models import tiny_model

STUCK = timedelta(seconds=300)

_ALL: dict[tuple[str, int], Scenarios] = {}
folder = Path()  # on a rank: of its job, shared by all ranks


class Scenarios:
    """Functions of one test module, run one after the other by the same ranks."""

    def __init__(self, module: str, num_ranks: int) -> None:
        self._module, self._num_ranks = module, num_ranks
        self._functions: dict[str, Callable[[], Any]] = {}
        _ALL[module, num_ranks] = self

    def scenario(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self._functions[function.__name__] = function
        return function

    def add(self, name: str, function: Callable[..., Any], *values: Any) -> None:
        self._functions[name] = lambda: function(*values)

    def play(self, at: Path) -> Results:
        """Run all of them."""
        ended = job(self._num_ranks, _play, self._module, self._num_ranks, at, folder=at)
        return Results(at, self._num_ranks, ended.said)

    def play_here(self, at: Path) -> None:
        global folder
        folder = at
        for name, function in self._functions.items():
            path = _result(at, dist.get_rank(), name)
            try:
                path.write_text(json.dumps(function()))
            except Exception:
                path.unlink(missing_ok=True)
                path.with_suffix(".error").write_text(traceback.format_exc())
            dist.barrier()


class Results:
    """What the ranks returned; [name] -> one result a rank."""

    def __init__(self, at: Path, num_ranks: int, said: str) -> None:
        self.folder, self._num_ranks, self._said = at, num_ranks, said

    def __getitem__(self, name: str) -> list[Any]:
        paths = [_result(self.folder, rank, name) for rank in range(self._num_ranks)]
        if not all(path.exists() for path in paths):
            errors = [path.with_suffix(".error") for path in paths]
            said = "\n".join(path.read_text() for path in errors if path.exists())
            raise AssertionError(f"{name} did not end on all ranks:\n{said or self._said[-3000:]}")
        return [json.loads(path.read_text()) for path in paths]


def _result(at: Path, rank: int, name: str) -> Path:
    return at / f"{name}-{rank}.json"


def _play(module: str, num_ranks: int, at: Path) -> None:
    importlib.import_module(module)
    dist.init_process_group("gloo", timeout=STUCK)
    _ALL[module, num_ranks].play_here(at)
    dist.destroy_process_group()


# What scenarios need


def stored(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder with a tiny model, written once by rank 0."""
    words = [family.replace(" ", "_"), str(dtype), *(f"{key}={value}" for key, value in changes.items())]
    path = folder / "models" / "-".join(words)
    if dist.get_rank() == 0 and not path.exists():
        tiny_model(family, **changes).to(dtype).save_pretrained(path)
    dist.barrier()
    return path


def sharded(family: str, *, dtype: torch.dtype = torch.float32, changes: Any = None, **sizes: Any) -> Any:
    """A tiny model split by transformers; sizes: fields of DistributedConfig."""
    return load(stored(family, dtype, **(changes or {})), dtype=dtype, **sizes)


def whole(family: str, *, dtype: torch.dtype = torch.float32, changes: Any = None) -> Any:
    """The same model on every rank."""
    return load(stored(family, dtype, **(changes or {})), dtype=dtype)


def load(path: Path, *, dtype: torch.dtype, **sizes: Any) -> Any:
    """A model from a folder that all ranks see, split if sizes are given."""
    config = DistributedConfig(**sizes) if sizes else None
    others = {"experts_implementation": "batched_mm"} if dtype == torch.float64 else {}  # grouped_mm has no float64
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=config, **others)
    if dtype == torch.float64 and config and config.ep_size > 1 and config.efsdp_size == 1:
        for block in describe_moe(model).blocks.values():
            experts: Any = block.experts  # FSDP2 divides gradients of other types than float32 and bfloat16 twice there
            if isinstance(experts, FSDPModule):
                experts.set_gradient_divide_factor(math.sqrt(config.dp_size))
    return model


def full(tensor: Any) -> Tensor:
    """The whole tensor; all ranks that hold parts must call."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def gathered(model: Any) -> dict[str, Tensor]:
    reshard_(model)
    return {name: full(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def gathered_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": full(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys(), set(one) ^ set(other)
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the SecateurError an action raises; None if it raises none."""
    try:
        action()
    except SecateurError as error:
        return str(error)
    return None
