"""LAEP in a plain training loop: when it prunes, what it prunes, and that training goes on as if built that way."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler
from transformers.optimization import Adafactor

from secateur.decide.rule import Rule
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.stats import RouterStats
from secateur.surgery.events import PruneEvent
from secateur.train import laep as laep_module
from secateur.train.distributed import job as job_module
from secateur.train.laep import LAEP
from secateur.train.load_history import LoadHistory
from secateur.train.phases import PhaseConstants, in_words, phase_of
from secateur.train.rearrange import Rearrangement, rearranged
from secateur.train.schedule import Pruning
from support.tiny_models import everything, random_tokens, tiny_model

TOKENS_PER_STEP = 4 * 8
QUICK_PHASE = PhaseConstants(max_regret=0.15, max_noise=1.0, min_change=0.0, min_windows=5)

WARMUP, SLOW = 17, PhaseConstants(max_regret=0.225, max_noise=1.0, min_change=0.0, min_windows=5)


def batch(step: int) -> Tensor:
    """Tokens of a step. Up to step 6 every step has words of its own, so loads move; then the words stay the same."""
    low, high = (1 + 8 * step, 9 + 8 * step) if step < 6 else (1, 40)
    return torch.randint(low, high, (4, 8), generator=torch.Generator().manual_seed(min(step, 6)))


def adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


class Run:
    """A model, its optimizer, and LAEP."""

    def __init__(
        self,
        name: str = "mixtral",
        *,
        model: PreTrainedModel | None = None,
        optimizer: Callable[[PreTrainedModel], torch.optim.Optimizer] = adamw,
        **laep: Any,
    ) -> None:
        self.model = tiny_model(name) if model is None else model
        self.optimizer = optimizer(self.model)
        self.pruner = LAEP(self.model, self.optimizer, **{"window_steps": 2, "phase": QUICK_PHASE, **laep})
        self.losses: list[float] = []

    def step(self, index: int) -> PruneEvent | None:
        self.model.train()
        loss = self.model(input_ids=batch(index), labels=batch(index)).loss
        loss.backward()
        self.optimizer.step()
        event = self.pruner.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return event

    def go(self, start: int, stop: int) -> dict[int, PruneEvent]:
        events = {index + 1: self.step(index) for index in range(start, stop)}
        return {step: event for step, event in events.items() if event is not None}


def watched(steps: int, name: str = "mixtral", **laep: Any) -> list[RouterStats]:
    """The windows of the same run without a pruning."""
    run = Run(name, prunings=[], **laep)
    windows = []
    for index in range(steps):
        run.step(index)
        if run.pruner.last_window is not None:
            windows.append(run.pruner.last_window)
    return windows


def without_clock(event: PruneEvent) -> dict[str, Any]:
    return event.to_json() | {"surgery_seconds": None}


# When


def test_it_prunes_once_at_the_given_step_in_the_middle_of_a_window_too() -> None:
    events = Run(at_step=3, target_params=0.8).go(0, 8)
    assert list(events) == [3]
    assert (events[3].step, events[3].reason, events[3].tokens) == (3, "step", 3 * TOKENS_PER_STEP)


def test_it_prunes_at_the_end_of_the_window_in_which_the_tokens_are_reached() -> None:
    events = Run(at_tokens=3 * TOKENS_PER_STEP, target_params=0.8).go(0, 8)
    assert list(events) == [4]
    assert (events[4].step, events[4].reason, events[4].tokens) == (4, "tokens", 4 * TOKENS_PER_STEP)


def test_it_prunes_when_the_detector_says_that_the_loads_are_stable() -> None:
    history, stable = LoadHistory(), []
    for number, window in enumerate(watched(32), start=1):
        history.add(window.loads(), 2 * TOKENS_PER_STEP)
        stable.append(phase_of(history, SLOW, rises=2 * number < WARMUP).stable)
    first = 2 * (stable.index(True) + 1)
    assert first > WARMUP + 2, "the loads were stable from the start, so this test could not fail"
    run = Run(target_params=0.8, warmup_steps=WARMUP, phase=SLOW)
    phases = {}
    events = {}
    for index in range(32):
        event = run.step(index)
        events |= {} if event is None else {index + 1: event}
        phases[index + 1] = run.pruner.phase
    assert list(events) == [first]
    assert events[first].reason == "stable"
    assert set(phases.values()) == {"begin", "warm-up", "moving", "pruned"}
    assert [step for step, phase in phases.items() if phase == "pruned"] == list(range(first, 33))


def test_the_default_keeps_two_thirds_of_the_parameters_at_the_stable_phase() -> None:
    run = Run()
    (event,) = run.go(0, 14).values()
    assert event.reason == "stable"
    assert event.parameters_after <= 0.67 * event.parameters_before


def test_a_schedule_prunes_at_each_of_its_times_by_its_own_rule() -> None:
    schedule = [
        Pruning(rule=Rule(target_params=0.9), at_step=2),
        Pruning(rule=Rule(alpha=1.0), at_tokens=5 * TOKENS_PER_STEP),
        Pruning(rule=Rule(target_params=0.9)),
    ]
    run = Run(prunings=schedule)
    events = run.go(0, 16)
    assert [event.reason for event in events.values()] == ["step", "tokens", "stable"]
    assert list(events)[:2] == [2, 6]
    assert [event.alpha for event in events.values()] == [None, 1.0, None]
    first, second, third = events.values()
    assert {layer: one.experts_after for layer, one in first.layers.items()} == {
        layer: one.experts_before for layer, one in second.layers.items()
    }
    assert first.parameters_after == second.parameters_before
    assert run.pruner.moe.counts == {layer: one.experts_after for layer, one in third.layers.items()}
    composed = {layer: one.order for layer, one in run.pruner.plan.layers.items()}
    plans = [event.plan for event in events.values()]
    assert composed == {layer: one.order for layer, one in plans[0].compose(plans[1]).compose(plans[2]).layers.items()}


def test_a_pruning_right_after_another_is_decided_on_the_tokens_between_them() -> None:
    schedule = [Pruning(rule=Rule(target_params=0.9), at_step=step) for step in (4, 5)]
    first, second = Run(prunings=schedule).go(0, 6).values()
    assert (first.step, second.step) == (4, 5)
    assert {sum(loads) for loads in second.loads.values()} == {TOKENS_PER_STEP * 2}
    assert second.tokens == 5 * TOKENS_PER_STEP
    assert second.parameters_before == first.parameters_after


def test_an_empty_schedule_only_watches() -> None:
    model = tiny_model("mixtral")
    run = Run(model=model, prunings=[], phase=SLOW, optimizer=lambda model: torch.optim.NAdam(model.parameters()))
    assert run.go(0, 10) == {}
    assert run.pruner.phase == "stable"
    assert run.pruner.last_window is not None
    loads = run.pruner.last_window.loads().values()
    expected = sum(max(one) / (sum(one) / 8) for one in loads) / 3
    assert run.pruner.load_max_over_mean == pytest.approx(expected)


def test_how_uneven_loads_are_is_said_of_the_last_window() -> None:
    run = Run(prunings=[])
    seen = []
    for stop in (2, 4):
        run.go(stop - 2, stop)
        assert run.pruner.last_window is not None
        loads = run.pruner.last_window.loads().values()
        seen.append(sum(max(one) / (sum(one) / 8) for one in loads) / 3)
        assert run.pruner.load_max_over_mean == pytest.approx(seen[-1])
    assert seen[0] != seen[1]


# What


def removed_by_hand(loads: list[int], alpha: float, beta: float) -> set[int]:
    """arXiv 2601.14327: at most alpha times the mean, and together less than beta of all; a tie keeps the lower id."""
    gone, running = set(), 0
    for load, minus_id in sorted((load, -expert) for expert, load in enumerate(loads)):
        running += load
        if load > alpha * sum(loads) / len(loads) or running >= beta * sum(loads):
            break
        gone.add(-minus_id)
    return gone


def test_thresholds_remove_what_the_criterion_says_of_the_loads_of_the_last_windows() -> None:
    windows = watched(5)
    stats = windows[0] + windows[1]  # of steps 1 to 4, and step 5 is the open window
    run = Run(at_step=4, alpha=0.9, beta=0.4)
    (event,) = run.go(0, 4).values()
    assert event.loads == stats.loads()
    assert event.plan.stats_digest == stats.digest()
    for layer, loads in stats.loads().items():
        assert set(event.layers[layer].dropped) == removed_by_hand(loads, 0.9, 0.4)
    assert event.experts_after < event.experts_before


def test_the_open_window_counts_too() -> None:
    (event,) = Run(at_step=3, target_params=0.9).go(0, 3).values()
    assert {sum(loads) for loads in event.loads.values()} == {3 * TOKENS_PER_STEP * 2}


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_at_most_the_given_share_of_tokens_loses_its_expert(share: float) -> None:
    (event,) = Run(at_step=4, max_rerouted=share).go(0, 4).values()
    assert 0 < event.rerouted_share <= share


@pytest.mark.parametrize("target", [0.9, 0.67])
def test_at_most_the_given_share_of_parameters_stays(target: float) -> None:
    run = Run("deepseek_v3", at_step=4, target_params=target)
    (event,) = run.go(0, 4).values()
    found = sum(parameter.numel() for parameter in run.model.parameters())
    assert event.parameters_after == found <= target * event.parameters_before


def test_uniform_keeps_one_count_and_the_native_class() -> None:
    run = Run(at_step=4, target_params=0.7, uniform=True)
    (event,) = run.go(0, 4).values()
    assert len({one.experts_after for one in event.layers.values()}) == 1
    assert type(run.model) is transformers.MixtralForCausalLM
    assert event.plan.details["rule"]["uniform"] is True


def test_counts_keep_to_the_given_multiple_and_bounds() -> None:
    run = Run(at_step=4, alpha=10.0, multiple_of=2, min_experts=3, max_experts=6)
    run.go(0, 4)
    assert set(run.pruner.moe.counts.values()) == {4}


def test_router_groups_keep_equally_many() -> None:
    run = Run("deepseek_v3 grouped", at_step=4, target_params=0.75)
    (event,) = run.go(0, 4).values()
    for one in event.plan.layers.values():
        kept = [sum(old // 4 == group for old in one.order) for group in (0, 1)]
        assert kept[0] == kept[1] >= 2


def test_the_numbers_of_an_event_are_those_counted_by_hand() -> None:
    run = Run("gpt_oss", at_step=4, target_params=0.8)
    sizes = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
    (event,) = run.go(0, 4).values()
    after = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
    assert (event.parameters_before, event.parameters_after) == (sum(sizes.values()), sum(after.values()))
    assert event.memory_before.parameters_bytes == 4 * sum(sizes.values())
    assert event.memory_after.parameters_bytes == 4 * sum(after.values())
    # AdamW holds two numbers a parameter and a step counter of four bytes a tensor
    assert event.memory_before.optimizer_bytes == 8 * sum(sizes.values()) + 4 * len(sizes)
    assert event.memory_after.optimizer_bytes == 8 * sum(after.values()) + 4 * len(sizes)
    assert (event.experts_before, event.experts_after) == (24, sum(run.pruner.moe.counts.values()))
    gone = total = 0
    for layer, loads in event.loads.items():
        kept = event.plan.layers[layer].order
        assert event.layers[layer].dropped == tuple(sorted(set(range(8)) - set(kept)))
        lost = sum(loads[old] for old in event.layers[layer].dropped)
        assert event.layers[layer].rerouted_share == pytest.approx(lost / sum(loads))
        assert sum(loads) == 4 * TOKENS_PER_STEP * 2
        gone, total = gone + lost, total + sum(loads)
    assert event.rerouted_share == pytest.approx(gone / total)
    assert event.oracle_max_abs_difference == 0.0
    assert event.surgery_seconds > 0
    assert event is run.pruner.events[0]


@pytest.mark.parametrize("rule", [{"alpha": math.inf, "beta": 0.3}, {"alpha": 0.9}, {"target_params": 0.8}])
def test_an_event_is_the_same_after_json(rule: dict[str, float]) -> None:
    (event,) = Run(at_step=4, **rule).go(0, 4).values()
    text = json.dumps(event.to_json(), allow_nan=False)
    assert PruneEvent.from_json(json.loads(text)) == event
    assert event.describe().startswith("pruned at step 4 (step): experts 24 -> ")


# Training goes on

OPTIMIZERS: dict[str, Callable[[PreTrainedModel], torch.optim.Optimizer]] = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "Adafactor of torch": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-3),
    "Adafactor of transformers": lambda m: transformers.optimization.Adafactor(m.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_pruning_every_optimizer_goes_on_as_for_a_model_built_with_the_pruned_counts(name: str) -> None:
    run = Run("deepseek_v3", at_step=3, target_params=0.8, optimizer=OPTIMIZERS[name])
    assert list(run.go(0, 3)) == [3]
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(run.model.config))
    reference.load_state_dict(run.model.state_dict())
    optimizer = OPTIMIZERS[name](reference)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    for index in range(3, 6):
        run.step(index)
        reference.train()
        reference(input_ids=batch(index), labels=batch(index)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, expected = run.model.state_dict(), reference.state_dict()
    assert [key for key in expected if not torch.equal(trained[key], expected[key])] == []
    names = [spec.name for block in run.pruner.moe.blocks.values() for spec in block.tensors if "bias" not in spec.name]
    assert [key for key in names if torch.equal(trained[key], start[key])] == []


def test_the_learning_rate_schedule_is_the_same_with_and_without_pruning() -> None:
    rates = []
    for prunings in ([], [Pruning(rule=Rule(target_params=0.8), at_step=3)]):
        run = Run(prunings=prunings)
        scheduler = transformers.get_cosine_schedule_with_warmup(run.optimizer, 2, 8)
        rates.append([])
        for index in range(8):
            run.step(index)
            scheduler.step()
            rates[-1].append(run.optimizer.param_groups[0]["lr"])
        assert len(run.pruner.events) == len(prunings)
    assert rates[0] == rates[1]


def test_losses_up_to_the_pruning_are_those_of_a_run_without_it() -> None:
    pruned, plain = Run(at_step=4, target_params=0.8), Run(prunings=[])
    pruned.go(0, 6)
    plain.go(0, 6)
    assert pruned.losses[:4] == plain.losses[:4]
    assert pruned.losses[4:] != plain.losses[4:]


def test_an_accumulated_step_counts_once_with_the_tokens_of_all_micro_batches() -> None:
    run = Run(at_step=2, target_params=0.8)
    event = None
    for index in range(2):
        for part in batch(index).chunk(4):
            (run.model.train()(input_ids=part, labels=part).loss / 4).backward()
        run.optimizer.step()
        event = run.pruner.step()
        run.optimizer.zero_grad()
    assert event is not None
    assert event.step == 2
    assert event.tokens == 2 * TOKENS_PER_STEP


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loads_nor_training(reentrant: bool) -> None:
    plain, saving = Run(at_step=3, target_params=0.8), Run(at_step=3, target_params=0.8)
    saving.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    saving.model.enable_input_require_grads()
    expected, found = plain.go(0, 5)[3], saving.go(0, 5)[3]
    assert without_clock(found) == without_clock(expected)
    assert saving.losses == plain.losses


def test_mixed_precision_and_a_gradient_scaler_go_on_after_a_pruning() -> None:
    run = Run(at_step=2, target_params=0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for index in range(6):
        run.model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run.model(input_ids=batch(6), labels=batch(6)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        scaler.step(run.optimizer)
        scaler.update()
        event = run.pruner.step()
        run.optimizer.zero_grad()
        scales.append(scaler.get_scale())
        run.losses.append(loss.item())
        assert (event is not None) == (index == 1)
        if event is not None:
            assert event.oracle_max_abs_difference == 0.0
    assert scales == [2.0**10] * 2 + [2.0**11] * 3 + [2.0**12]
    assert run.losses[-1] < run.losses[2] < run.losses[0]


def test_a_step_that_a_gradient_scaler_skips_is_no_step() -> None:
    run = Run(at_step=3, target_params=0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    events = []
    for index in range(5):
        loss = run.model.train()(input_ids=batch(6), labels=batch(6)).loss
        scaler.scale(loss * (math.inf if index == 1 else 1)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        events.append(run.pruner.step())
        run.optimizer.zero_grad()
    assert [event is not None for event in events] == [False, False, False, True, False]
    assert run.pruner.num_steps == 4
    assert events[3] is not None
    assert events[3].oracle_max_abs_difference == 0.0


def test_routers_that_are_frozen_are_pruned_and_stay_frozen() -> None:
    model = tiny_model("mixtral")
    frozen = {name: one for name, one in model.named_parameters() if ".gate." in name}
    for one in frozen.values():
        one.requires_grad_(False)
    run = Run(
        model=model,
        optimizer=lambda m: torch.optim.AdamW([one for one in m.parameters() if one.requires_grad], lr=1e-3),
        at_step=3,
        target_params=0.8,
    )
    before = {name: one.detach().clone() for name, one in frozen.items()}
    (event,) = run.go(0, 5).values()
    assert event.oracle_max_abs_difference == 0.0
    for name, one in frozen.items():
        order = event.plan.layers[int(name.split(".")[2])].order
        assert torch.equal(one, before[name][list(order)])


# Resume

TWICE = [Pruning(rule=Rule(target_params=0.85), at_step=5), Pruning(rule=Rule(alpha=1.0), at_step=9)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[int, Path], dict[int, Any]]:
    """A run with two prunings, its folders by step, and its phase and unevenness then."""
    run, folders, seen = Run("deepseek_v3", prunings=TWICE), {}, {}
    steps = []
    for index in range(12):
        steps += [index + 1] if run.step(index) is not None else []
        if index + 1 not in (3, 4, 5, 8, 9):
            continue
        folder = folders[index + 1] = tmp_path_factory.mktemp("whole")
        run.model.save_pretrained(folder)
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "pruner.json").write_text(json.dumps(run.pruner.state_dict(), allow_nan=False))
        seen[index + 1] = run.pruner.phase, run.pruner.load_max_over_mean
    assert steps == [5, 9]
    return run, folders, seen


@pytest.mark.parametrize(
    ("stop", "moment"),
    [
        pytest.param(3, "in a window", marks=pytest.mark.slow),
        (4, "just before"),
        (5, "just after"),
        pytest.param(8, "between", marks=pytest.mark.slow),
        pytest.param(9, "just after the second", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    stop: int, moment: str, whole: tuple[Run, dict[int, Path], dict[int, Any]]
) -> None:
    run, saved, seen = whole
    model = AutoModelForCausalLM.from_pretrained(saved[stop])
    second = Run(model=model, prunings=TWICE)
    second.optimizer.load_state_dict(torch.load(saved[stop] / "optimizer.pt", weights_only=True))
    second.pruner.load_state_dict(json.loads((saved[stop] / "pruner.json").read_text()))
    assert (second.pruner.phase, second.pruner.load_max_over_mean) == seen[stop]
    second.go(stop, 12)
    assert run.losses[:stop] + second.losses == run.losses
    expected, found = run.model.state_dict(), second.model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert [without_clock(e) for e in second.pruner.events] == [without_clock(e) for e in run.pruner.events]
    state, other = (without_clock_in(one.pruner.state_dict()) for one in (second, run))
    assert state == other


def without_clock_in(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"events": [event | {"surgery_seconds": None} for event in state["events"]]}


def test_the_stable_phase_is_found_at_the_same_step_after_a_resume() -> None:
    """From each of three steps before it."""
    run, before, second = Run(target_params=0.8), {}, {}
    for stop in range(14):
        if stop in (7, 8, 9):
            second[stop] = Run(model=copy.deepcopy(run.model), target_params=0.8)
            second[stop].optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
            second[stop].pruner.load_state_dict(json.loads(json.dumps(run.pruner.state_dict())))
            assert second[stop].pruner.phase == run.pruner.phase
        before |= run.go(stop, stop + 1)
    for stop, one in second.items():
        assert [*(step for step in before if step <= stop), *one.go(stop, 14)] == [*before]


GATE = "model.layers.0.mlp.gate.weight"


def test_weights_that_lie_unaligned_in_a_mapped_file_are_moved_and_keep_their_bits(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(parameter.data_ptr() % 64 for parameter in model.parameters()), "so this test could not fail"
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    LAEP(model, adamw(model))
    assert not any(parameter.data_ptr() % 64 for parameter in model.parameters())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


WRONG_STATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "'version' is 7, expected 2": ({}, {"version": 7}),
    "LAEP state: 'num_steps' is -1, expected a whole number": ({}, {"num_steps": -1}),
    "event: 'step' is missing": ({}, {"events": [{}]}),
    "plan: 'format' is missing": ({}, {"plan": {}}),
    "LAEP state, watch: 'num_tokens' is missing": ({}, {"watch": {}}),
    "of a model with experts .*0: 4.*load the model from the checkpoint": ({}, {"counts": {"0": 4, "1": 8, "2": 8}}),
    "other settings.*'window_steps': 2.*'window_steps': 3": ({"window_steps": 3}, {}),
    "other settings.*target_params=0.8.*target_params=0.5": ({"target_params": 0.5}, {}),
    "other settings.*at_step=5.*at_step=6": ({"at_step": 6}, {}),
    "the saved constants of the phase are": ({"phase": PhaseConstants(max_regret=0.5)}, {}),
    r"1 expert tensors, e.g. model.layers.0.mlp.gate.weight, are not those": ({}, {"checksums": {GATE: 0}}),
}


@pytest.mark.parametrize("message", WRONG_STATES)
def test_the_state_of_another_run_is_refused_and_nothing_is_changed(message: str) -> None:
    settings, changes = WRONG_STATES[message]
    first = Run(at_step=5, target_params=0.8)
    first.go(0, 3)
    second = Run(model=copy.deepcopy(first.model), **{"at_step": 5, "target_params": 0.8, **settings})
    before = second.pruner.state_dict()
    with pytest.raises(SecateurError, match=message):
        second.pruner.load_state_dict(first.pruner.state_dict() | changes)
    assert second.pruner.state_dict() == before


# Refusals before training


@pytest.mark.parametrize(
    ("laep", "message"),
    [
        ({"window_steps": 0}, "window_steps is 0"),
        ({"window_steps": 2.5}, "window_steps is 2.5"),
        ({"at_step": 0}, "at_step is 0"),
        ({"at_step": True}, "at_step is True"),
        ({"at_tokens": 1.5}, "at_tokens is 1.5"),
        ({"at_step": 1, "at_tokens": 1}, "at_step or at_tokens, not both"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": 2.0}, "beta"),
        ({"target_params": 1.5}, "target_params"),
        ({"max_rerouted": -0.1}, "max_rerouted"),
        ({"alpha": 0.5, "target_params": 0.5}, "expected exactly one of"),
        ({"prunings": [Pruning(rule=Rule(alpha=1.0))], "alpha": 0.5}, r"not both: found \['alpha'\]"),
        ({"prunings": [Pruning(rule=Rule(alpha=1.0))], "at_step": 1}, r"not both: found \['at_step'\]"),
        ({"prunings": [Pruning(rule=Rule(alpha=1.0))], "multiple_of": 4}, r"not both: found \['multiple_of'\]"),
        ({"prunings": [Pruning(rule=Rule(alpha=1.0), at_step=s) for s in (5, 5)]}, "must increase, found"),
        ({"min_experts": 9}, "min_experts|9"),
        ({"multiple_of": 16}, "multiple_of|16"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_and_leaves_no_hook(laep: dict[str, Any], message: str) -> None:
    model = tiny_model("mixtral")
    before = everything(model)
    with pytest.raises(SecateurError, match=message):
        LAEP(model, adamw(model), **laep)
    assert everything(model) == before


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.Adagrad, torch.optim.Adamax])
def test_an_optimizer_without_a_rule_is_refused_before_training(optimizer: type[torch.optim.Optimizer]) -> None:
    model = tiny_model("mixtral")
    before = everything(model)
    with pytest.raises(SecateurError, match=f"{optimizer.__name__}.*expected one of"):
        LAEP(model, optimizer(model.parameters()))
    assert everything(model) == before


@pytest.mark.slow
def test_a_model_in_data_parallel_or_compiled_is_refused() -> None:
    model = tiny_model("mixtral")
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        with pytest.raises(SecateurError, match="not a wrapper"):
            LAEP(wrapped, adamw(model))


# Failures at the pruning step


@pytest.mark.parametrize("name", ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"])
def test_nan_in_a_router_is_refused(name: str) -> None:
    run = Run("deepseek_v3", at_step=3, target_params=0.8)
    run.go(0, 2)
    run.model.train()
    run.model(input_ids=batch(2), labels=batch(2)).loss.backward()
    run.optimizer.step()
    with torch.no_grad():
        run.model.get_parameter_or_buffer(f"model.layers.2.{name}")[0] = math.nan
    before = everything(run.model)
    with pytest.raises(SecateurError, match=rf"layer 2: .*{name} has NaN or infinite values at step 3"):
        run.pruner.step()
    assert everything(run.model) == before


def test_a_process_group_that_was_made_later_is_refused_at_the_first_step() -> None:
    run = Run(at_step=3, target_params=0.8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(SecateurError, match=r"2 processes in the job, but 1 .* make it after .*init_process_group"):
            run.step(0)
    finally:
        dist.destroy_process_group()


def test_nan_elsewhere_in_the_model_is_refused_as_what_it_is() -> None:
    run = Run(at_step=3, target_params=0.8)
    run.go(0, 2)
    run.model.train()
    run.model(input_ids=batch(2), labels=batch(2)).loss.backward()
    run.optimizer.step()
    with torch.no_grad():
        run.model.lm_head.weight[0] = math.nan
    before = everything(run.model)
    with pytest.raises(SecateurError, match="logits are NaN or infinite at step 3: the run has diverged"):
        run.pruner.step()
    assert everything(run.model) == before


def test_a_description_that_is_given_is_used_and_that_of_another_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = tiny_model("mixtral"), tiny_model("mixtral")
    moe = describe_moe(model)
    monkeypatch.setattr(laep_module, "describe_moe", lambda *_: pytest.fail("described again"))
    pruner = LAEP(model, adamw(model), moe=moe)
    assert pruner.moe is moe
    pruner.detach()
    with pytest.raises(SecateurError, match="moe: found the description of another model"):
        LAEP(other, adamw(other), moe=moe)


@pytest.mark.parametrize("goal", [{"target_params": 0.01}, {"target_params": 0.5, "min_experts": 6}])
def test_a_goal_that_floors_make_impossible_is_refused_at_the_first_step(goal: dict[str, Any]) -> None:
    run = Run(at_step=1000, **goal)
    with pytest.raises(SecateurError, match=r"target_params is .*, but the smallest share that can be reached"):
        run.step(0)


def test_a_pruning_before_any_token_was_counted_is_refused() -> None:
    run = Run(at_step=1, target_params=0.8)
    with pytest.raises(SecateurError, match="no token was counted"):
        run.pruner.step()


def test_the_self_check_stops_a_run_whose_pruned_model_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(moe: Any, plan: Any, optimizer: Any) -> Any:
        pruned = real(moe, plan, optimizer)
        with torch.no_grad():
            moe.model.model.layers[1].mlp.gate.weight[:2] = moe.model.model.layers[1].mlp.gate.weight[:2].flip(0)
        return pruned

    real = job_module.prune_model_
    monkeypatch.setattr(job_module, "prune_model_", broken)
    run = Run(at_step=3, target_params=0.8)
    with pytest.raises(RuntimeError, match=r"differs from the barred-experts oracle by .*a fault of"):
        run.go(0, 3)


def test_the_self_check_can_be_switched_off() -> None:
    (event,) = Run(at_step=3, target_params=0.8, self_check=False).go(0, 3).values()
    assert event.oracle_max_abs_difference is None


def test_after_detach_no_hook_is_left() -> None:
    model = tiny_model("mixtral")
    before = everything(model)
    run = Run(model=model, prunings=[])
    run.pruner.detach()
    assert everything(model) == before


def test_a_pruned_model_can_be_pruned_by_a_new_run() -> None:
    run = Run(at_step=2, target_params=0.8)
    run.go(0, 3)
    run.pruner.detach()
    again = Run(model=run.model, at_step=2, target_params=0.9)
    (event,) = again.go(0, 4).values()
    assert event.experts_before == sum(one.experts_after for one in run.pruner.events[0].layers.values())
    assert describe_moe(run.model).counts == again.pruner.moe.counts


def test_evaluation_between_steps_changes_no_count() -> None:
    plain, evaluated = Run(at_step=4, target_params=0.8), Run(at_step=4, target_params=0.8)
    expected = plain.go(0, 4)[4]
    for index in range(4):
        event = evaluated.step(index)
        evaluated.model.eval()
        with torch.no_grad():
            evaluated.model(input_ids=random_tokens(2, 8, seed=99))
    assert event is not None
    assert event.loads == expected.loads


def test_an_expert_has_moved_where_its_rank_is_another_one_by_the_old_and_the_new_number_of_experts() -> None:
    kept = LayerPlan(experts_before=8, order=(0, 2, 3, 7))  # of ranks 0, 0, 0 and 1; now two on each
    plan, placements = rearranged(
        Plan(layers={1: kept}, criterion="test"), {1: [1] * 8}, Rearrangement(ranks=2), num_ranks=2, num_groups=1
    )
    assert plan.layers[1] == kept  # all loads are alike, so they stand as they did
    assert placements[1].moved == 1


# The learning rate


def scheduled(steps: int, **laep: Any) -> tuple[Run, list[str], list[str]]:
    """A run with a linear warm-up of 16 steps, what LAEP said, and the phases at the ends of its windows."""
    said: list[str] = []
    run = Run(prunings=[Pruning(rule=Rule(target_params=0.8))], on_message=said.append, **laep)
    scheduler = get_scheduler("cosine", run.optimizer, num_warmup_steps=16, num_training_steps=40)
    phases = []
    for index in range(steps):
        event = run.step(index)
        scheduler.step()
        if run.pruner.last_window is not None:
            phases.append("pruned" if event else run.pruner.phase)
    return run, said, phases


EASY = PhaseConstants(max_regret=1.0, max_noise=1.0, min_change=0.0, min_windows=5)


def test_it_never_prunes_while_the_learning_rate_rises_though_nobody_told_it() -> None:
    run, said, phases = scheduled(24, phase=EASY)
    assert phases == ["begin"] * 4 + ["warm-up"] * 5 + ["pruned"] * 3
    (event,) = run.pruner.events
    assert event.step == 20  # step 17 has the highest rate, so the window of 19 and 20 is the first without a rise
    assert said == []


def test_a_schedule_that_is_followed_is_known_ahead() -> None:
    """A staircase: the rate rests for two windows at each step of the stairs."""
    said: list[str] = []
    run = Run(prunings=[Pruning(rule=Rule(target_params=0.8))], phase=EASY, on_message=said.append)
    stairs = LambdaLR(run.optimizer, lambda step: min(1.0, 0.25 * (1 + step // 6)))
    run.pruner.follow(stairs, 60)
    events = {}
    for index in range(30):
        event = run.step(index)
        stairs.step()
        events |= {} if event is None else {index + 1: event}
    assert list(events) == [22]  # the highest rate is that of step 19, seen after step 18
    assert said == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=40), "OneCycleLR cannot be read ahead"),
        (lambda optimizer: LambdaLR(optimizer, lambda step: 1 - 0.5 * (10 < step < 20)), "rises again at step 21"),
        (lambda optimizer: LambdaLR(optimizer, lambda step: step / 40), "rises up to step 40 of 40"),
    ],
)
def test_what_a_schedule_means_for_the_stable_phase_is_said(make: Any, words: str) -> None:
    said: list[str] = []
    run = Run(prunings=[Pruning(rule=Rule(target_params=0.8))], on_message=said.append)
    run.pruner.follow(make(run.optimizer), 40)
    assert len(said) == 1
    assert words in said[0]
    fixed = Run(at_step=3, target_params=0.8, on_message=said.append)
    fixed.pruner.follow(make(fixed.optimizer), 40)
    assert len(said) == 1, "a fixed step needs no stable phase"


def test_an_optimizer_that_sets_its_own_rate_is_said() -> None:
    said: list[str] = []
    optimizer = lambda model: Adafactor(model.parameters(), lr=None)  # noqa: E731
    run = Run(optimizer=optimizer, on_message=said.append)
    run.step(0)
    assert "sets its own learning rate" in said[0]
    Run(optimizer=optimizer, warmup_steps=5, on_message=said.append).step(0)
    assert len(said) == 1


def test_a_run_that_ends_before_it_is_stable_says_what_it_would_have_dropped() -> None:
    said: list[str] = []
    run = Run(target_params=0.8, phase=PhaseConstants(min_change=1.0), on_message=said.append)
    run.go(0, 16)
    unpruned = run.pruner.finish()
    assert unpruned is not None
    assert unpruned.waits_for == in_words(run.pruner.report, PhaseConstants(min_change=1.0))
    assert said == [unpruned.describe()]
    assert not run.model._forward_pre_hooks
    pruned = Run(at_step=16, target_params=0.8, phase=PhaseConstants(min_change=1.0))
    (event,) = pruned.go(0, 16).values()
    assert unpruned.dropped == {layer: one.dropped for layer, one in event.layers.items()}
    assert unpruned.rerouted_share == pytest.approx(event.rerouted_share)
    assert pruned.pruner.finish() is None
    assert Run().pruner.finish() is None, "nothing was trained"


def test_before_the_first_window_there_is_nothing_to_choose_by() -> None:
    run = Run(target_params=0.8)
    run.step(0)
    unpruned = run.pruner.unpruned()
    assert unpruned is not None
    assert (unpruned.dropped, unpruned.waits_for) == (None, "begin")
    assert unpruned.describe().endswith("no loads yet to choose by")
