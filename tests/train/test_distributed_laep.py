"""LAEP on several ranks: the run through prunings and rearrangements is that of one process on the same batches."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.stats import RouterStats
from secateur.surgery.events import PruneEvent
from secateur.train.callback import LAEPCallback
from secateur.train.laep import LAEP
from secateur.train.phases import PhaseConstants
from secateur.train.rearrange import Rearrangement
from support import distributed_runs as runs
from support.distributed_runs import (
    Scenarios,
    full,
    gathered,
    gathered_state,
    largest_difference,
    refusal,
    sharded,
    whole,
)
from support.long_tests import ARE_RUN, long
from support.tiny_models import tiny_model

ONE = Scenarios(__name__, 1)
TWO = Scenarios(__name__, 2)
FOUR = Scenarios(__name__, 4)

SMALL = {"num_hidden_layers": 2}
ROWS, LENGTH, STEPS, PRUNE_AT = 8, 12, 9, 5
BEGUN = 7  # steps of the runs that are compared with the first ones of a longer run
QUICK_PHASE = PhaseConstants(max_regret=0.005, max_noise=1.0, min_change=0.0, min_windows=5)
PRUNING: dict[str, Any] = {"at_step": PRUNE_AT, "target_params": 0.8, "window_steps": 2}

Kind = dict[str, Any]


def batch(step: int, parts: int = 1, part: int = 0) -> Tensor:
    """Rows of one rank of a step. The words in use change slowly, so the loads of the experts drift."""
    words = torch.Generator().manual_seed(step)
    tokens = torch.randint(1 + step % 30, 30 + step % 30, (ROWS, LENGTH), generator=words)
    return tokens.chunk(parts)[part]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # eps keeps the update of a gradient near zero, which is mostly rounding, from being as large as any other
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Run:
    """A model that trains with LAEP; `train` is what the loop calls, the model or its DDP."""

    def __init__(
        self,
        model: Any,
        *,
        train: Any = None,
        parts: int = 1,
        part: int = 0,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        **laep: Any,
    ) -> None:
        self.model, self.train = model, train or model
        self.parts, self.part = parts, part
        self.optimizer = optimizer(model)
        self.pruner = LAEP(model, self.optimizer, **laep)
        self.losses: list[float] = []
        self.phases: list[str] = []

    def step(self, index: int) -> PruneEvent | None:
        self.train.train()
        tokens = batch(index, self.parts, self.part)
        loss = self.train(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        event = self.pruner.step()
        self.phases.append(self.pruner.phase)
        self.optimizer.zero_grad()
        mean = full(loss).clone()
        if self.pruner.num_processes > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.losses.append(float(mean))
        return event

    def go(self, start: int, stop: int) -> Run:
        for index in range(start, stop):
            self.step(index)
        return self

    def result(self) -> Kind:
        return {"losses": self.losses, "events": [comparable(event) for event in self.pruner.events]}

    def tensors(self) -> dict[str, Tensor]:
        return gathered(self.model) | gathered_state(self.model, self.optimizer)


def comparable(event: PruneEvent) -> Kind:
    """What does not depend on the number of ranks."""
    local = {"memory_before", "memory_after", "surgery_seconds", "oracle_max_abs_difference"}
    return {key: value for key, value in event.to_json().items() if key not in local}


def in_job(model: Any, sizes: Kind, **others: Any) -> Run:
    parts = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    return Run(model, parts=parts, part=dist.get_rank() // sizes.get("tp_size", 1), **others)


# Splits. Those without expert parallelism place the experts on ranks that are not there.

SPLITS: dict[str, tuple[Scenarios, Kind, int]] = {
    "fsdp 2": (TWO, {"fsdp_size": 2}, 2),
    "fsdp 2, ep 2": (TWO, {"fsdp_size": 2, "ep_size": 2}, 2),
    "tp 2, ep 2": (TWO, {"tp_size": 2, "ep_size": 2}, 2),
    "fsdp 4": (FOUR, {"fsdp_size": 4}, 2),
    "fsdp 4, ep 2": (FOUR, {"fsdp_size": 4, "ep_size": 2}, 2),
    "fsdp 4, ep 4": (FOUR, {"fsdp_size": 4, "ep_size": 4}, 4),
    "fsdp 2, tp 2, ep 2": (FOUR, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}, 2),
    "fsdp 2, tp 2, ep 4": (FOUR, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}, 4),
    "replicas 2, fsdp 2, ep 2": (FOUR, {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}, 2),
}
LONG = {
    "fsdp 4",
    "fsdp 4, ep 2",
    "fsdp 4, ep 4",
    "fsdp 2, tp 2, ep 2",
}  # other numbers of ranks for what the rest has, too


def settings(ranks: int) -> Kind:
    return PRUNING | {"rearrange": Rearrangement(ranks=ranks, every=4)}


def split_run(name: str, sizes: Kind, ranks: int) -> Kind:
    model = sharded("qwen3_moe", dtype=torch.float64, changes=SMALL, **sizes)
    run = in_job(model, sizes, **settings(ranks)).go(0, STEPS)
    tensors = run.tensors()
    if dist.get_rank() == 0:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, runs.folder / name)
    return run.result() | {"oracle": max(event.oracle_max_abs_difference or 0 for event in run.pruner.events)}


for _name, (_ranks, _sizes, _placed) in SPLITS.items():
    if ARE_RUN or _name not in LONG:
        _ranks.add(_name, split_run, _name, _sizes, _placed)


@functools.cache
def in_one_process(ranks: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw) -> Run:
    model = tiny_model("qwen3_moe", **SMALL).to(torch.float64)
    model.set_experts_implementation("batched_mm")
    return Run(model, optimizer=optimizer, **settings(ranks)).go(0, STEPS)


# Other kinds of jobs


@TWO.scenario
def momentum() -> Kind:
    sizes = {"fsdp_size": 2, "ep_size": 2}
    model = sharded("qwen3_moe", dtype=torch.float64, changes=SMALL, **sizes)
    return in_job(model, sizes, optimizer=sgd, **settings(2)).go(0, BEGUN).result()


@TWO.scenario
def copies() -> Kind:
    model = whole("qwen3_moe", dtype=torch.float64, changes=SMALL)
    run = Run(model, train=DistributedDataParallel(model), parts=2, part=dist.get_rank(), **settings(2))
    return run.go(0, BEGUN).result()


@TWO.scenario
def sums() -> Kind:
    """How often the ranks' counts are added up."""
    sizes = {"fsdp_size": 2}
    run = in_job(sharded("qwen3_moe", changes=SMALL, **sizes), sizes, prunings=[], window_steps=4)
    calls, add = [0], run.pruner._job.ranks.sum

    def counted(*args: Any) -> RouterStats:
        calls[0] += 1
        return add(*args)

    run.pruner._job.ranks.sum = counted
    found = []
    for index in range(9):
        run.step(index)
        found.append(calls[0])
    return found


def forward_after(optimizer: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of shards, which a forward pass then leaves gathered."""
    made = optimizer(model)
    logits_of(model, batch(0))
    return made


@TWO.scenario
def gathered_shards() -> bool:
    model = whole("qwen3_moe", changes=SMALL)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False, mp_policy=half)
    fully_shard(model, reshard_after_forward=False, mp_policy=half)
    late = functools.partial(forward_after, adamw)
    run = Run(model, parts=2, part=dist.get_rank(), optimizer=late, prunings=[]).go(0, 2)
    before = run.pruner.state_dict()["checksums"]
    logits_of(model, batch(0))  # leaves every layer gathered, in bfloat16
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    return run.pruner.state_dict()["checksums"] == before == run.pruner._job.checksums(describe_moe(model))


# Faults, each on one rank only


def fault(make: Callable[[Run], None], *, rank: int = 1) -> Kind:
    """A run whose next step prunes, in which `make` goes wrong on one rank."""
    sizes = {"fsdp_size": 2, "ep_size": 2}
    run = in_job(sharded("qwen3_moe", changes=SMALL, **sizes), sizes, **settings(2)).go(0, PRUNE_AT - 1)
    run.pruner.step = lambda: None  # type: ignore[method-assign]
    run.step(PRUNE_AT - 1)
    del run.pruner.step
    if dist.get_rank() == rank:
        make(run)
    before = run.tensors()
    message = refusal(run.pruner.step)
    after = run.tensors()
    same = all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    return {"message": message, "same": same, "counts": list(run.pruner.moe.counts.values())}


@TWO.scenario
def another_plan() -> Kind:
    def other(run: Run) -> None:
        decide = run.pruner._decide
        run.pruner._decide = lambda stats, pruning: replace(decide(stats, pruning), criterion="another")  # type: ignore[method-assign]

    return fault(other)


@TWO.scenario
def nan_in_a_router() -> Kind:
    def poison(run: Run) -> None:
        run.model.model.layers[1].mlp.gate.weight.to_local()[0, 0] = math.nan

    return fault(torch.no_grad()(poison))


@TWO.scenario
def neither_copies_nor_shards() -> str | None:
    model = whole("qwen3_moe", changes=SMALL)
    return refusal(lambda: Run(model, parts=2, part=dist.get_rank(), **settings(2)).go(0, 1))


# transformers' Trainer


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = batch(index)[0]
        return {"input_ids": tokens, "labels": tokens}


def by_trainer(model: Any, name: str) -> Kind:
    callback = LAEPCallback(**settings(2))
    arguments = TrainingArguments(
        output_dir=str(runs.folder / name),
        per_device_train_batch_size=2,
        max_steps=8,
        save_steps=6,
        save_only_model=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        max_grad_norm=0,
        learning_rate=3e-3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[callback])
    trainer.train()
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(runs.folder / name / "checkpoint-6")
    return {
        "events": [comparable(event) for event in callback.events],
        "oracle": max(event.oracle_max_abs_difference or 0 for event in callback.events),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "loaded": list(describe_moe(loaded).counts.values()),
        "counts": list(callback.pruner.moe.counts.values()),  # type: ignore[union-attr]
    }


@TWO.scenario
def trainer_of_shards() -> Kind:
    return by_trainer(sharded("qwen3_moe", changes=SMALL, fsdp_size=2, ep_size=2), "shards")


@TWO.scenario
def trainer_of_copies() -> Kind:
    return by_trainer(whole("qwen3_moe", changes=SMALL), "copies")


# A state that goes on elsewhere; SGD without momentum has none of its own


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


ELSEWHERE: list[tuple[int, Kind]] = [
    (3, {"fsdp_size": 4, "ep_size": 4}),
    (7, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    (10, {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}),
]


@FOUR.scenario
def elsewhere() -> Kind:
    path, state, start, losses = runs.stored("qwen3_moe", torch.float64, **SMALL), None, 0, []
    watched: Kind = PRUNING | {"window_steps": 4, "rearrange": False}
    for turn, (stop, sizes) in enumerate(ELSEWHERE):
        model = runs.load(path, dtype=torch.float64, **sizes)
        run = in_job(model, sizes, optimizer=plain_sgd, **watched)
        if state is not None:
            run.pruner.load_state_dict(json.loads(state))
        run.go(start, stop)
        losses += run.losses
        state, start, path = json.dumps(run.pruner.state_dict()), stop, runs.folder / f"part-{turn}"
        model.save_pretrained(path)
        dist.barrier()
    return {"losses": losses, "state": json.loads(state or "")}


@ONE.scenario
def one_rank() -> Kind:
    model = whole("qwen3_moe", dtype=torch.float64, changes=SMALL)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return Run(model, **settings(2)).go(0, BEGUN).result()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ONE.play(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TWO.play(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return FOUR.play(tmp_path_factory.mktemp("four"))


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(one, marks=[long] * (one in LONG)) for one in SPLITS])
def test_a_run_through_pruning_and_rearrangement_is_that_of_one_process(two: Any, four: Any, name: str) -> None:
    ranks, _, placed = SPLITS[name]
    results = (two if ranks is TWO else four)[name]
    expected = in_one_process(placed)
    assert [event.reason for event in expected.pruner.events][:2] == ["rearrange", "step"]
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, abs=1e-5)
        assert result["events"] == json.loads(json.dumps([comparable(event) for event in expected.pruner.events]))
        assert result["oracle"] <= 1e-9
    tensors = load_file((two if ranks is TWO else four).folder / name)
    assert largest_difference(tensors, expected.tensors()) <= 1e-5


def assert_begins_like(result: Kind, expected: Run) -> None:
    steps = len(result["losses"])
    assert result["losses"] == pytest.approx(expected.losses[:steps], abs=1e-5)
    events = [comparable(event) for event in expected.pruner.events if event.step <= steps]
    assert result["events"] == json.loads(json.dumps(events))


@pytest.mark.torchrun
@pytest.mark.slow
def test_so_is_one_with_momentum(two: Any) -> None:
    for result in two["momentum"]:
        assert_begins_like(result, in_one_process(2, sgd))


@pytest.mark.torchrun
@pytest.mark.slow
def test_so_is_one_of_copies_under_ddp(two: Any) -> None:
    for result in two["copies"]:
        assert_begins_like(result, in_one_process(2))


@pytest.mark.torchrun
@pytest.mark.slow
def test_so_is_one_rank_under_fsdp2(one: Any) -> None:
    (result,) = one["one_rank"]
    assert_begins_like(result, in_one_process(2))


@pytest.mark.torchrun
@pytest.mark.slow
def test_counts_are_added_up_once_a_window(two: Any) -> None:
    assert two["sums"] == [[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_state_is_of_the_shards_also_when_they_are_gathered(two: Any) -> None:
    assert two["gathered_shards"] == [True, True]


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_rank_that_decides_otherwise_stops_all_ranks_and_changes_nothing(two: Any) -> None:
    for found in two["another_plan"]:
        assert found["message"].startswith("plan: ranks [1] of 2 disagree with rank 0, nothing was changed")
        assert found["same"]
        assert found["counts"] == [8, 8]


@pytest.mark.torchrun
@pytest.mark.slow
def test_nan_on_one_rank_stops_all_ranks_and_changes_nothing(two: Any) -> None:
    first, second = two["nan_in_a_router"]
    assert first == second
    assert "model.layers.1.mlp.gate.weight has NaN or infinite values at step 5" in first["message"]
    assert first["same"]
    assert first["counts"] == [8, 8]


@pytest.mark.torchrun
@pytest.mark.slow
def test_several_processes_that_do_not_train_one_model_are_refused_at_the_first_step(two: Any) -> None:
    for message in two["neither_copies_nor_shards"]:
        assert "the job has 2 processes, but no forward pass of the model ran under DistributedDataParallel" in message


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer_of_shards", "trainer_of_copies"])
def test_the_callback_prunes_in_a_stock_trainer(two: Any, kind: str) -> None:
    first, second = two[kind]
    assert first == second
    assert [event["reason"] for event in first["events"]][:2] == ["rearrange", "step"]
    assert first["loaded"] == first["counts"] != [8, 8]
    assert first["oracle"] <= 1e-4
    other = two["trainer_of_shards" if kind == "trainer_of_copies" else "trainer_of_copies"][0]
    assert first["losses"] == pytest.approx(other["losses"], abs=1e-2)


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_run_goes_on_from_its_state_on_other_splits(four: Any) -> None:
    model = tiny_model("qwen3_moe", **SMALL).to(torch.float64)
    model.set_experts_implementation("batched_mm")
    expected = Run(model, optimizer=plain_sgd, **PRUNING | {"window_steps": 4, "multiple_of": 2}).go(0, 10)
    for result in four["elsewhere"]:
        assert result["losses"] == pytest.approx(expected.losses, abs=1e-5)
        assert result["state"]["watch"] == json.loads(json.dumps(expected.pruner.state_dict()["watch"]))


# Rearrangement alone, in one process


def watched(steps: int, **laep: Any) -> Run:
    settings = {"prunings": [], "window_steps": 2, "phase": QUICK_PHASE, **laep}
    return Run(tiny_model("qwen3_moe"), **settings).go(0, steps)


def test_rearrangement_changes_no_logit_and_no_training() -> None:
    plain, moved = watched(12), watched(12, rearrange=Rearrangement(ranks=4, every=2))
    assert len(moved.pruner.events) >= 3
    assert {event.reason for event in moved.pruner.events} == {"rearrange"}
    assert max(event.oracle_max_abs_difference or 0 for event in moved.pruner.events) <= 1e-6
    assert moved.losses == pytest.approx(plain.losses, abs=1e-5)
    assert not any(one.dropped for event in moved.pruner.events for one in event.plan.layers.values())


def test_the_detector_and_the_windows_follow_the_experts() -> None:
    plain, moved = watched(22), watched(22, rearrange=Rearrangement(ranks=4, every=2))
    assert "stable" in plain.phases[2:]
    assert "moving" in plain.phases[2:]
    assert moved.phases == plain.phases
    places = moved.pruner.plan.layers
    mine, theirs = moved.pruner._watch.settled(), plain.pruner._watch.settled()
    assert mine is not None
    assert theirs is not None
    for layer, loads in mine.loads().items():
        assert loads == [theirs.loads()[layer][old] for old in places[layer].order]


def test_the_ranks_are_evener_and_the_moves_are_reported() -> None:
    (event,) = watched(4, rearrange=Rearrangement(ranks=4, every=4)).pruner.events
    assert event.placement is not None
    for layer, one in event.placement.items():
        order, loads = event.plan.layers[layer].order, event.loads[layer]
        ranks = [loads[order[place]] + loads[order[place + 1]] for place in (0, 2, 4, 6)]
        before = [loads[place] + loads[place + 1] for place in (0, 2, 4, 6)]
        assert one.balance_after == pytest.approx(max(ranks) * 4 / sum(ranks))
        assert one.balance_before == pytest.approx(max(before) * 4 / sum(before))
        assert one.balance_after < one.balance_before
        assert one.moved == sum(order[place] // 2 != place // 2 for place in range(8)) > 0
    assert PruneEvent.from_json(json.loads(json.dumps(event.to_json(), allow_nan=False))) == event


def test_a_tolerance_moves_fewer_experts() -> None:
    moves = []
    for tolerance in (None, 0.1, 100.0):
        rule = Rearrangement(ranks=4, every=4, tolerance=tolerance)
        events = watched(4, rearrange=rule).pruner.events
        moves.append(sum(one.moved for event in events for one in (event.placement or {}).values()))
    assert moves[0] > moves[1] > moves[2] == 0


def test_a_pruning_places_what_it_keeps_and_is_only_a_matter_of_order() -> None:
    kept = []
    for rule in (False, Rearrangement(ranks=2)):
        run = Run(tiny_model("qwen3_moe"), **PRUNING | {"rearrange": rule, "multiple_of": 2}).go(0, PRUNE_AT)
        (event,) = run.pruner.events
        kept.append({layer: sorted(one.order) for layer, one in event.plan.layers.items()})
    assert kept[0] == kept[1]
    assert any(not one.is_ascending for one in event.plan.layers.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "ranks is 0"),
        ({"every": 0}, "every is 0"),
        ({"nodes": -1}, "nodes is -1"),
        ({"method": "magic"}, "'magic', expected one of"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": math.inf}, "tolerance is inf"),
        ({"ranks": 4, "nodes": 3}, "4 ranks do not divide over 3 nodes"),
    ],
)
def test_a_rearrangement_that_cannot_be_is_refused(settings: Kind, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Rearrangement(**settings)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (True, "no expert parallelism"),
        (Rearrangement(every=4), "no expert parallelism"),
        (Rearrangement(ranks=3), "layer 0 has 8 experts, expected a multiple of 3"),
    ],
)
def test_a_rearrangement_that_does_not_fit_the_job_is_refused(rule: Any, message: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(SecateurError, match=message):
        LAEP(model, adamw(model), rearrange=rule)
