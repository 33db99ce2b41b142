"""DistributedDataParallel goes on synchronising after surgery: two real processes, gloo."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import (
    _hook_then_optimizer as fused_optimizer,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.optimizer import unwrap
from secateur.train.distributed.ddp import DDPFinder, check_ddp, rebuild_ddp_
from support import distributed_runs as runs
from support.distributed_runs import Scenarios
from support.tiny_models import random_plan, random_tokens, tiny_model

pytestmark = pytest.mark.slow


# Two processes: all cases in one job, each in a folder of its own

TWO = Scenarios(__name__, 2)
RANKS, STEPS_BEFORE, STEPS_AFTER = 2, 3, 5
MICRO_BATCHES, ROWS, LENGTH = 2, 2, 8  # a step; rows of one rank


def case(name: str, target: Callable[..., None], *values: Any) -> None:
    """`target(rank, folder, *values)` on both ranks, for the test that asks for the folder `name`."""
    TWO.add(name, _on_rank, name, target, values)


def _on_rank(name: str, target: Callable[..., None], values: tuple[Any, ...]) -> None:
    folder = runs.folder / name
    folder.mkdir(exist_ok=True)
    target(dist.get_rank(), folder, *values)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, which ended without an error on both ranks."""
    results = TWO.play(tmp_path_factory.mktemp("two"))

    def folder(name: str) -> Path:
        assert results[name] == [None] * RANKS
        return results.folder / name

    return folder


def store(model: nn.Module, file: Path) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    save_file({name: tensor.detach().clone() for name, tensor in tensors}, file)


def of_ranks(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"rank-{rank}") for rank in range(RANKS)]


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# A training run, on one process or on two


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    return random_tokens(ROWS, LENGTH, seed=(step * MICRO_BATCHES + micro) * RANKS + rank)


def new_model(family: str = "qwen3_moe", *, unused: bool = False) -> Any:
    model = tiny_model(family)
    if unused:
        model.spare = nn.Parameter(torch.ones(3))
    return model


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # eps keeps the update of a gradient near zero, which is mostly rounding, from being as large as any other
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def prune(model: Any, optimizer: torch.optim.Optimizer) -> None:
    moe = describe_moe(model)
    after = prune_model_(moe, random_plan(moe), unwrap(optimizer))
    assert len(set(after.counts.values())) > 1


def zero(optimizer: torch.optim.Optimizer, how: str) -> None:
    if how != "never":
        optimizer.zero_grad(set_to_none=how == "none")


@functools.cache
def alone(zeroing: str = "none", **model: Any) -> dict[str, Tensor]:
    """The same run in one process: the same global batches, every mean over all rows of a micro-batch."""
    net = new_model(**model)
    optimizer = new_optimizer(net)
    for step in range(STEPS_BEFORE + STEPS_AFTER):
        for micro in range(MICRO_BATCHES):
            for rank in range(RANKS):
                tokens = micro_batch(step, micro, rank)
                (net(input_ids=tokens, labels=tokens).loss / RANKS).backward()
        optimizer.step()
        if step == STEPS_BEFORE - 1:
            prune(net, optimizer)
        zero(optimizer, zeroing)
    return {name: value.detach() for name, value in [*net.named_parameters(), *net.named_buffers()]}


def train(
    rank: int,
    settings: dict[str, Any],
    *,
    zeroing: str = "none",
    rebuild: bool = True,
    prepare: Callable[[DistributedDataParallel], None] = lambda ddp: None,
    look: Callable[[DistributedDataParallel, int], None] = lambda ddp, step: None,
    **model: Any,
) -> DistributedDataParallel:
    """One rank's part of `alone`; `look` is called after every backward pass of a step."""
    net = new_model(**model)
    finder = DDPFinder(net)
    ddp = DistributedDataParallel(net, **settings)
    prepare(ddp)
    optimizer = new_optimizer(net)
    for step in range(STEPS_BEFORE + STEPS_AFTER):
        for micro in range(MICRO_BATCHES):
            tokens = micro_batch(step, micro, rank)
            last = micro == MICRO_BATCHES - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                ddp(input_ids=tokens, labels=tokens).loss.backward()
        look(ddp, step)
        optimizer.step()
        if step == STEPS_BEFORE - 1:
            found = finder.ready()
            assert found is ddp
            prune(net, optimizer)
            if rebuild:
                rebuild_ddp_(found)
        zero(optimizer, zeroing)
    return ddp


# What a rank runs, by case


def plain(rank: int, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    store(train(rank, settings, **options).module, folder / f"rank-{rank}")


def bucket_views(rank: int, folder: Path) -> None:
    storages: list[int] = []

    def look(ddp: DistributedDataParallel, step: int) -> None:
        grads = [parameter.grad for parameter in ddp.module.parameters() if parameter.grad is not None]
        assert len(grads) == len(list(ddp.module.parameters()))
        storages.append(len({grad.untyped_storage().data_ptr() for grad in grads}))

    ddp = train(rank, {"gradient_as_bucket_view": True}, zeroing="zeros", look=look)
    assert storages == [1] * (STEPS_BEFORE + STEPS_AFTER)  # all gradients are views of one bucket
    store(ddp.module, folder / f"rank-{rank}")


REDUCED: list[int] = []


def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch takes no annotation given as text
    REDUCED.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(state, bucket)  # type: ignore[arg-type]


def communication_hook(rank: int, folder: Path) -> None:
    held: list[Any] = []
    sizes: list[tuple[int, int]] = []
    buckets: list[int] = []

    def prepare(ddp: DistributedDataParallel) -> None:
        ddp.register_comm_hook(None, counting)
        held.append(ddp.reducer)  # a reducer that somebody still holds must not reduce any more

    def look(ddp: DistributedDataParallel, step: int) -> None:
        sizes.append((sum(REDUCED), sum(parameter.numel() for parameter in ddp.module.parameters())))
        buckets.append(len(REDUCED))
        REDUCED.clear()

    ddp = train(rank, {"bucket_cap_mb": 0.01}, prepare=prepare, look=look)
    assert all(reduced == parameters for reduced, parameters in sizes)  # every parameter, once
    assert sizes[STEPS_BEFORE] < sizes[0]
    # bucket_cap_mb holds: one bucket in the first step, then buckets of that size in the order of the backward pass
    assert buckets == [1, 10, 10, 1, 10, 10, 10, 10]
    assert held[0] is not ddp.reducer
    store(ddp.module, folder / f"rank-{rank}")


def what_stays(rank: int, folder: Path) -> None:
    runs: list[str] = []
    reducers: list[Any] = []
    states: list[dict[str, Any]] = []
    kept = (
        "static_graph", "dim", "device_ids", "output_device", "broadcast_buffers", "find_unused_parameters", "training",
        "gradient_as_bucket_view", "bucket_bytes_cap", "require_backward_grad_sync", "parameters_to_ignore",
        "process_group", "module",
    )  # fmt: skip
    group = dist.new_group([0, 1])

    def prepare(ddp: DistributedDataParallel) -> None:
        ddp.register_forward_pre_hook(lambda *_: runs.append("before"))
        ddp.register_forward_hook(lambda *_: runs.append("after"))

    def look(ddp: DistributedDataParallel, step: int) -> None:
        reducers.append(weakref.ref(ddp.reducer))
        states.append({name: getattr(ddp, name) for name in kept})
        local = ddp.module.model.norm.weight.grad
        grads = [torch.empty_like(local) for _ in range(RANKS)]
        dist.all_gather(grads, local)
        assert not torch.equal(*grads)  # an ignored parameter is not synchronised, before and after

    net = new_model()
    ignored = {"model.norm.weight"}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
    ddp = DistributedDataParallel(net, broadcast_buffers=False, process_group=group, bucket_cap_mb=3)
    prepare(ddp)
    optimizer = new_optimizer(net)
    for step in range(4):
        tokens = micro_batch(step, 0, rank)
        ddp(input_ids=tokens, labels=tokens).loss.backward()
        look(ddp, step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            prune(net, optimizer)
            rebuild_ddp_(ddp)
    assert runs == ["before", "after"] * 4
    assert states == [states[0]] * 4
    assert states[0]["parameters_to_ignore"] == ignored
    assert reducers[0]() is None and reducers[3]() is ddp.reducer  # noqa: PT018 - not pytest's process
    store(net, folder / f"rank-{rank}")


def selection_bias(rank: int, folder: Path, broadcast: bool) -> None:
    net = new_model("deepseek_v3")
    ddp = DistributedDataParallel(net, broadcast_buffers=broadcast)
    optimizer = new_optimizer(net)
    for step in range(3):
        tokens = micro_batch(step, 0, rank)
        ddp(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if step == 0:
            prune(net, optimizer)
            rebuild_ddp_(ddp)
            for name, buffer in net.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer += rank
        optimizer.zero_grad()
    store(net, folder / f"rank-{rank}")


def static_graph(rank: int, folder: Path) -> None:
    """Without no_sync in the first step, which torch does not support with a static graph."""
    net = new_model(unused=True)
    ddp = DistributedDataParallel(net, static_graph=True)
    optimizer = new_optimizer(net)
    for step in range(6):
        tokens = micro_batch(step, 0, rank)
        ddp(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if step == 2:
            prune(net, optimizer)
            rebuild_ddp_(ddp)
        optimizer.zero_grad()
    assert ddp.static_graph
    store(net, folder / f"rank-{rank}")


class PruneAtThree(TrainerCallback):
    def __init__(self, rebuild: bool) -> None:
        self.rebuild = rebuild
        self.finder: DDPFinder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finder = DDPFinder(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            assert self.finder is not None
            ddp = self.finder.ready()
            assert ddp is not None
            prune(kwargs["model"], kwargs["optimizer"])
            if self.rebuild:
                rebuild_ddp_(ddp)


def trainer(rank: int, folder: Path, rebuild: bool) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(64, LENGTH)]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    )
    model = new_model()
    run = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=[PruneAtThree(rebuild)],
    )
    run.train()
    assert arguments.world_size == RANKS
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    run.save_model(str(folder / "model"))
    store(model, folder / f"rank-{rank}")


def refused_on_two_ranks(rank: int, folder: Path) -> None:
    net = new_model()
    finder = DDPFinder(net)
    net(input_ids=micro_batch(0, 0, rank))
    (folder / f"no-wrapper-{rank}").write_text(message(finder.ready))

    ddp = DistributedDataParallel(net)
    moe = describe_moe(net)
    plan = Plan(layers={0: LayerPlan(experts_before=8, order=tuple(range(5 + rank)))}, criterion="test")
    prune_model_(moe, plan)
    reducer = ddp.reducer
    (folder / f"other-shapes-{rank}").write_text(message(rebuild_ddp_, ddp))
    assert ddp.reducer is reducer


PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "gradients-stay": ({}, {"zeroing": "never"}),
    "unused-parameter": ({"find_unused_parameters": True}, {"unused": True}),
    "bucket-views-stay": ({"gradient_as_bucket_view": True}, {"zeroing": "never"}),
}
for _name, (_settings, _options) in PLAIN.items():
    case(_name, plain, _settings, _options)
case("without-rebuild", plain, {"find_unused_parameters": True}, {"rebuild": False})
case("refused", refused_on_two_ranks)
for _case in (bucket_views, communication_hook, static_graph, what_stays):
    case(_case.__name__, _case)
for _is_on in (True, False):
    case(f"broadcast-{_is_on}", selection_bias, _is_on)
    case(f"trainer-{_is_on}", trainer, _is_on)


def message(function: Callable[..., Any], *values: Any) -> str:
    with pytest.raises(SecateurError) as caught:
        function(*values)
    return str(caught.value)


# The claims


@pytest.mark.torchrun
def test_without_the_rebuild_the_next_step_does_not_fit_the_old_buckets(two: Any) -> None:
    with pytest.raises(AssertionError, match=r"grad\.numel\(\) == bucket_view\.numel\(\)"):
        two("without-rebuild")


@pytest.mark.torchrun
@pytest.mark.parametrize("name", PLAIN)
def test_with_it_two_ranks_equal_one_process(two: Any, name: str) -> None:
    assert_equal_to_one_process(two(name), **PLAIN[name][1])


@pytest.mark.torchrun
@pytest.mark.parametrize("name", ["bucket_views", "communication_hook"])
def test_buckets_and_communication_hooks_go_on(two: Any, name: str) -> None:
    assert_equal_to_one_process(two(name))


def assert_equal_to_one_process(folder: Path, **options: Any) -> None:
    one, other = of_ranks(folder)
    assert not differing(one, other)
    expected = alone(**options)
    assert one.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.torchrun
def test_the_static_graph_is_recorded_anew(two: Any) -> None:
    one, other = of_ranks(two("static_graph"))
    assert not differing(one, other)


@pytest.mark.torchrun
def test_settings_hooks_and_ignored_parameters_stay(two: Any) -> None:
    one, other = of_ranks(two("what_stays"))
    assert "model.norm.weight" in differing(one, other)  # ignored, so everything else has drifted with it


@pytest.mark.torchrun
@pytest.mark.parametrize("broadcast", [True, False])
def test_buffers_are_broadcast_as_before(two: Any, broadcast: bool) -> None:
    one, other = of_ranks(two(f"broadcast-{broadcast}"))
    biases = {name for name in one if name.endswith("e_score_correction_bias")}
    assert len({one[name].shape for name in biases}) > 1
    assert biases & differing(one, other) == (set() if broadcast else biases)


@pytest.mark.torchrun
def test_in_a_trainer(two: Any) -> None:
    with pytest.raises(AssertionError, match=r"grad\.numel\(\) == bucket_view\.numel\(\)"):
        two("trainer-False")
    folder = two("trainer-True")
    one, other = of_ranks(folder)
    assert not differing(one, other)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not differing(one, dict([*loaded.named_parameters(), *loaded.named_buffers()]))


@pytest.mark.torchrun
def test_refusals_reach_every_rank(two: Any) -> None:
    folder = two("refused")
    for rank in range(RANKS):
        assert "2 processes, but no forward pass" in (folder / f"no-wrapper-{rank}").read_text()
        assert "rank 1 of 2 have parameters or buffers of other" in (folder / f"other-shapes-{rank}").read_text()


# One process is enough for the rest


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.two(self.one(x)) if both else self.one(x)


def wrapped(**settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Tiny(), **settings)


def delayed(*, everything: bool) -> DistributedDataParallel:
    model = Tiny()
    model.one.requires_grad_(not everything)
    named = [(name, parameter) for name, parameter in model.named_parameters() if name.startswith("two")]
    return DistributedDataParallel(model, delay_all_reduce_named_params=named, param_to_hook_all_reduce=model.two.bias)


def with_mixed_precision() -> DistributedDataParallel:
    ddp = wrapped()
    ddp.mixed_precision = object()  # type: ignore[assignment]  # a real one needs a GPU
    return ddp


def with_python_reducer() -> DistributedDataParallel:
    ddp = wrapped()
    ddp._use_python_reducer = True  # a real one changes settings of torch.compile for the whole process
    return ddp


def with_mesh() -> DistributedDataParallel:
    return wrapped(device_mesh=dist.init_device_mesh("cpu", (1,)))


def compiled() -> DistributedDataParallel:
    ddp = wrapped()
    ddp.compile()
    return ddp


def with_hook(state: object, hook: Callable[..., Any]) -> DistributedDataParallel:
    ddp = wrapped()
    ddp.register_comm_hook(state, hook)
    return ddp


def with_builtin_hook() -> DistributedDataParallel:
    ddp = wrapped()
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return ddp


class Keeper:
    """Communication hooks that keep tensors in each of the places there are."""

    def method(self, state, bucket):  # type: ignore[no-untyped-def]
        return default_hooks.allreduce_hook(state, bucket)

    def closure(self) -> Callable[..., Any]:
        kept: list[Tensor] = []

        def hook(state, bucket):  # type: ignore[no-untyped-def]
            kept.append(bucket.buffer())
            return default_hooks.allreduce_hook(state, bucket)

        return hook


def logged(ddp: DistributedDataParallel) -> dict[str, Any]:
    """What DDP says of itself: settings, parameters, bucket sizes."""
    return {key: value for key, value in ddp._get_ddp_logging_data().items() if "time" not in key}


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters=true")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"find_unused_parameters": True, "bucket_cap_mb": 1e-5},
        {"find_unused_parameters": True, "static_graph": True, "bucket_cap_mb": 1e-5},
        {"gradient_as_bucket_view": True},
    ],
)
def test_a_rebuilt_ddp_is_like_a_new_one_and_keeps_nothing_old(settings: dict[str, Any]) -> None:
    model = Tiny()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {"two.bias"})
    ddp = DistributedDataParallel(model, **settings)
    ddp(torch.ones(1, 2)).sum().backward()
    old = [weakref.ref(ddp.reducer), weakref.ref(model.one.weight)]
    model.one.weight = nn.Parameter(torch.ones(3, 2))
    model.two.weight = nn.Parameter(torch.ones(2, 3))
    model.one.bias = nn.Parameter(torch.ones(3))
    make, alive = ddp._ddp_init_helper, []
    ddp._ddp_init_helper = lambda *values: (alive.append(old[0]()), make(*values))
    rebuild_ddp_(ddp)
    del ddp._ddp_init_helper
    assert alive == [None]  # the old buckets are freed before the new ones are made
    gc.collect()
    assert [one() for one in old] == [None, None]
    new = DistributedDataParallel(model, **settings)
    assert logged(ddp) == logged(new)
    assert [id(one) for one in ddp._module_parameters] == [id(one) for one in new._module_parameters]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: delayed(everything=False), "delay_all_reduce_named_params"),
        (lambda: delayed(everything=True), "delay_all_reduce_named_params"),
        (with_mixed_precision, "mixed_precision"),
        (with_mesh, "device_mesh"),
        (with_python_reducer, "python_reducer"),
        (compiled, "torch.compile"),
        (with_builtin_hook, "built-in communication hook"),
        (lambda: with_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook), "PowerSGDState"),
        (lambda: with_hook(None, Keeper().method), "Keeper.method"),
        (lambda: with_hook(None, Keeper().closure()), "Keeper.closure"),
        (lambda: with_hook(None, fused_optimizer(default_hooks.allreduce_hook, object())), "hook_then_optimizer"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(make: Callable[[], DistributedDataParallel], name: str) -> None:
    ddp = make()
    assert name in message(check_ddp, ddp)
    assert name in message(DDPFinder, ddp)
    before = dict(vars(ddp))
    assert name in message(rebuild_ddp_, ddp)
    assert vars(ddp) == before


@pytest.mark.usefixtures("group")
def test_what_is_refused_shows_in_the_first_forward_or_at_the_latest_before_surgery() -> None:
    ddp = with_builtin_hook()
    DDPFinder(ddp.module)
    assert "built-in" in message(ddp, torch.ones(1, 2))

    ddp = wrapped()
    finder = DDPFinder(ddp)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    assert "built-in" in message(finder.ready)


@pytest.mark.usefixtures("group")
def test_a_torch_with_other_insides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ddp = wrapped()
    monkeypatch.delattr(DistributedDataParallel, "_ddp_init_helper")
    assert "no _ddp_init_helper" in message(check_ddp, ddp)


@pytest.mark.usefixtures("group")
def test_no_rebuild_while_ranks_may_have_run_out_of_batches() -> None:
    ddp = wrapped()
    with ddp.join():
        ddp(torch.ones(1, 2)).sum().backward()
        assert "join()" in message(check_ddp, ddp)


@pytest.mark.usefixtures("group")
def test_stateless_communication_hooks_are_accepted_and_registered_once() -> None:
    state = dist.group.WORLD
    for hook in (default_hooks.fp16_compress_hook, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)):
        ddp = with_hook(state, hook)
        rebuild_ddp_(ddp)
        rebuild_ddp_(ddp)
        assert ddp._comm_hooks == [(hook, state)]


@pytest.mark.usefixtures("group")
def test_gradients_that_wait_for_their_reduction_are_not_lost() -> None:
    ddp = wrapped()
    finder = DDPFinder(ddp)
    with ddp.no_sync():
        assert "no_sync" in message(finder.ready)
        ddp(torch.ones(1, 2)).sum().backward()
    assert "no_sync" in message(finder.ready)
    with torch.no_grad():
        ddp(torch.ones(1, 2))  # an evaluation between them changes nothing
    assert "no_sync" in message(finder.ready)
    ddp(torch.ones(1, 2)).sum().backward()
    assert finder.ready() is ddp
    with ddp.no_sync():
        ddp(torch.ones(1, 2)).sum().backward()
    ddp.zero_grad()
    assert finder.ready() is ddp


@pytest.mark.usefixtures("group")
def test_a_backward_pass_that_did_not_finish_is_refused() -> None:
    ddp = wrapped()
    finder = DDPFinder(ddp)
    assert finder.ready() is ddp
    ddp(torch.ones(1, 2), both=False).sum().backward()
    assert "find_unused_parameters" in message(finder.ready)


class Student(nn.Module):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.teacher = [teacher]  # in a list, so it is no part of the student

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) - self.teacher[0](x).detach()
        return out


@pytest.mark.usefixtures("group")
def test_the_finder_sees_the_ddp_that_runs_the_model() -> None:
    x, teacher = torch.ones(1, 2), Tiny()
    student = Student(teacher)
    whole, part = DDPFinder(student), DDPFinder(student.inner)
    apart = DDPFinder(teacher)
    assert whole.ready() is None  # in one process a model needs no wrapper
    ddp = DistributedDataParallel(student)
    student(x)
    assert whole.wrapper is None
    ddp(x)
    assert whole.wrapper is part.wrapper is whole.ready() is ddp
    assert apart.wrapper is None  # run within the forward of the student's DDP, but not wrapped by it
    copy.deepcopy(student)  # the hook does not drag the process group along

    again = DistributedDataParallel(student)
    again(x)
    whole.detach()
    ddp(x)
    assert whole.wrapper is again
    assert part.wrapper is ddp
    del again, ddp
    gc.collect()
    assert part.wrapper is None


def test_without_processes_there_is_nothing_to_rebuild() -> None:
    assert DDPFinder(Tiny()).ready() is None
