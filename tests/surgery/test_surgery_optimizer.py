from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertAxis, ExpertTensor, gather
from secateur.plans import LayerPlan
from secateur.surgery.optimizer import (
    OPTIMIZER_RULES,
    Replacement,
    check_optimizer,
    optimizer_state_bytes,
    replace_parameters_,
    unwrap,
)

E = 6
PLAN = LayerPlan(experts_before=E, order=(4, 0, 5, 1))
OUTSIDE = LayerPlan(experts_before=E, order=(0, 1, 2, 6))
# name -> (shape, where its experts are); "dense" has none and must not change
LAYOUTS: dict[str, tuple[tuple[int, ...], ExpertTensor | None]] = {
    "dense": ((5, 3), None),
    "expert": ((E, 3, 5), ExpertTensor(name="expert", axis=ExpertAxis(dim=0))),
    "router": ((E, 7), ExpertTensor(name="router", axis=ExpertAxis(dim=0))),
    "bias": ((E,), ExpertTensor(name="bias", axis=ExpertAxis(dim=0))),
    "middle": ((3, E, 5), ExpertTensor(name="middle", axis=ExpertAxis(dim=1))),
    "last": ((3, 5, E), ExpertTensor(name="last", axis=ExpertAxis(dim=2))),
    "square": ((E, E), ExpertTensor(name="square", axis=ExpertAxis(dim=1))),
    "packed": ((E * 2 + 3, 5), ExpertTensor(name="packed", axis=ExpertAxis(dim=0, rows_per_expert=2, num_trailing=3))),
}
Parameters = dict[str, nn.Parameter]


class Case:
    """A way to build an optimizer; twins built and stepped alike hold the same bits."""

    def __init__(self, cls: type[torch.optim.Optimizer], *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.cls, self.dtype, self.options = cls, dtype, options

    def __str__(self) -> str:
        flags = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.cls.__module__.split(".")[0], self.cls.__name__, str(self.dtype), *flags])

    def trained(self, steps: int = 3) -> tuple[Parameters, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        parameters = {
            name: nn.Parameter(torch.randn(shape, generator=generator).to(self.dtype))
            for name, (shape, _) in LAYOUTS.items()
        }
        optimizer = self.cls(list(parameters.values()), **self.options)
        for seed in range(steps):
            step(optimizer, parameters, gradients(self.dtype, seed))
        return parameters, optimizer


def gradients(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in LAYOUTS.items()}


def step(optimizer: torch.optim.Optimizer, parameters: Parameters, grads: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    optimizer.step()
    optimizer.zero_grad()


def kept(name: str, tensor: Tensor, plan: LayerPlan = PLAN) -> Tensor:
    spec = LAYOUTS[name][1]
    return tensor.detach() if spec is None else gather(tensor, spec, plan)


def prune_(optimizer: torch.optim.Optimizer, parameters: Parameters, plan: LayerPlan = PLAN) -> Parameters:
    replacements = [replacement(parameters, name, plan) for name in LAYOUTS if LAYOUTS[name][1]]
    replace_parameters_(optimizer, replacements)
    return parameters | {r.spec.name: r.new for r in replacements}


def replacement(parameters: Parameters, name: str, plan: LayerPlan = PLAN) -> Replacement:
    spec, old = LAYOUTS[name][1], parameters[name]
    assert spec is not None
    new = nn.Parameter(gather(old, spec, plan), requires_grad=old.requires_grad)
    return Replacement(old=old, new=new, spec=spec, layer_plan=plan)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
            assert found[key].dtype == value.dtype
        else:
            assert found[key] == value


def snapshot(optimizer: torch.optim.Optimizer) -> list[object]:
    """Identity and value of everything replace_parameters_ could touch."""
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    values = [(id(p), key, id(v), str(v)) for p, state in optimizer.state.items() for key, v in state.items()]
    return [groups, values, [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]]


ADAMS = [torch.optim.Adam, torch.optim.AdamW]
FLAGS: list[dict[str, Any]] = [
    {"foreach": False},
    {"foreach": True},
    {"amsgrad": True, "foreach": False},
    {"amsgrad": True, "foreach": True},
    {"maximize": True},
]
ENTRYWISE = [
    *(Case(cls, weight_decay=0.1, **flags) for cls in ADAMS for flags in FLAGS),
    Case(torch.optim.AdamW, dtype=torch.bfloat16),
    Case(torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False),
    Case(torch.optim.SGD, lr=0.1),
    Case(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    Case(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    Case(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True, maximize=True),
    Case(torch.optim.RMSprop),
    Case(torch.optim.RMSprop, centered=True, weight_decay=0.1),
    Case(torch.optim.RMSprop, momentum=0.9, foreach=True),
    Case(torch.optim.RMSprop, momentum=0.9, centered=True, foreach=False),
]
FUSED = [
    *(Case(cls, fused=True, amsgrad=amsgrad, weight_decay=0.1) for cls in ADAMS for amsgrad in (False, True)),
    Case(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
]
ADAFACTORS = [
    Case(torch.optim.Adafactor),
    Case(torch.optim.Adafactor, foreach=True),
    Case(transformers.Adafactor, scale_parameter=True, relative_step=True, warmup_init=True),
    Case(transformers.Adafactor, scale_parameter=False, relative_step=False, lr=1e-3, beta1=0.9),
]


@pytest.mark.parametrize("case", ENTRYWISE, ids=str)
def test_gather_then_step_equals_step_then_gather_bit_for_bit(case: Case) -> None:
    pruned, first = case.trained()
    full, second = case.trained()
    pruned = prune_(first, pruned)
    for seed in (7, 8):
        grads = gradients(case.dtype, seed)
        step(first, pruned, {name: kept(name, grad) for name, grad in grads.items()})
        step(second, full, grads)
    for name in LAYOUTS:
        assert torch.equal(pruned[name], kept(name, full[name])), name
        expected = {
            key: kept(name, value) if isinstance(value, Tensor) and value.shape == full[name].shape else value
            for key, value in second.state.get(full[name], {}).items()
        }
        assert_same_state(first.state.get(pruned[name], {}), expected)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_kernels_commute_bit_for_bit_where_entries_fill_whole_vectors(case: Case) -> None:
    """16 of 32 experts: the CPU kernels round an unfilled last vector otherwise, whoever's entries it holds."""
    spec = ExpertTensor(name="w", axis=ExpertAxis(dim=0))
    layer_plan = LayerPlan(experts_before=32, order=tuple(range(31, 0, -2)))
    generator = torch.Generator().manual_seed(0)
    for shape in ((32, 3, 5), (32, 8), (32,)):
        first, *grads = [torch.randn(shape, generator=generator) for _ in range(5)]
        ends = []
        for steps_before in (2, len(grads)):
            parameter = nn.Parameter(first.clone())
            optimizer = case.cls([parameter], **case.options)
            for done in range(len(grads) + 1):
                if done == steps_before:
                    old, parameter = parameter, nn.Parameter(gather(parameter, spec, layer_plan))
                    pruned = Replacement(old=old, new=parameter, spec=spec, layer_plan=layer_plan)
                    replace_parameters_(optimizer, [pruned])
                if done < len(grads):
                    grad = grads[done]
                    step(
                        optimizer,
                        {"w": parameter},
                        {"w": gather(grad, spec, layer_plan) if done >= steps_before else grad},
                    )
            ends.append((parameter, optimizer.state[parameter]))
        assert torch.equal(ends[0][0], ends[1][0])
        assert_same_state(ends[0][1], ends[1][1])
        assert ends[0][1]


def test_the_commuting_cases_hold_every_state_key_of_the_rules() -> None:
    """So that no rule of the four optimizers above goes untested."""
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop):
        seen = {
            key
            for case in ENTRYWISE if case.cls is cls
            for state in case.trained(1)[1].state.values() for key in state
        }  # fmt: skip
        assert seen == set(OPTIMIZER_RULES[f"{cls.__module__}.{cls.__qualname__}"])


@pytest.mark.parametrize("case", ADAFACTORS, ids=str)
def test_adafactor_does_not_commute_but_its_state_is_the_gathered_one_and_steps(case: Case) -> None:
    parameters, optimizer = case.trained()
    full, reference = case.trained()
    pruned = prune_(optimizer, parameters)
    o, rows = list(PLAN.order), [8, 9, 0, 1, 10, 11, 2, 3, 12, 13, 14]
    torch_rows = {  # written out by hand: (row factor, column factor)
        "expert": (lambda r: r[o], lambda c: c[o]),
        "router": (lambda r: r[o], lambda c: c),
        "middle": (lambda r: r[:, o], lambda c: c),
        "last": (lambda r: r, lambda c: c[..., o]),
        "square": (lambda r: r, lambda c: c[..., o]),
        "packed": (lambda r: r[rows], lambda c: c),
        "dense": (lambda r: r, lambda c: c),
    }
    for name in LAYOUTS:
        before, after = reference.state[full[name]], optimizer.state[pruned[name]]
        expected = dict(before)
        for key, value in before.items():
            if key in ("row_var", "exp_avg_sq_row"):
                expected[key] = torch_rows[name][0](value)
            elif key in ("col_var", "exp_avg_sq_col"):
                expected[key] = torch_rows[name][1](value)
            elif key in ("variance", "exp_avg_sq", "exp_avg"):
                expected[key] = kept(name, value)
        assert_same_state(after, expected)
        assert len(after) >= 2

    grads = gradients(case.dtype, 7)
    step(optimizer, pruned, {name: kept(name, grad) for name, grad in grads.items()})
    step(reference, full, grads)
    assert all(p.isfinite().all() for p in pruned.values())
    assert not torch.equal(pruned["router"], kept("router", full["router"]))  # a mean over all experts: no identity
    assert torch.equal(pruned["dense"], full["dense"])


@pytest.mark.parametrize("case", [*ENTRYWISE, *FUSED, *ADAFACTORS], ids=str)
def test_after_surgery_a_fresh_optimizer_loads_the_state_and_steps_alike(case: Case) -> None:
    parameters, optimizer = case.trained()
    pruned = prune_(optimizer, parameters)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in pruned.items()}
    fresh = case.cls(list(copies.values()), **case.options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares tensors
    grads = {name: kept(name, grad) for name, grad in gradients(case.dtype, 7).items()}
    step(optimizer, pruned, grads)
    step(fresh, copies, grads)
    for name in LAYOUTS:
        assert torch.equal(pruned[name], copies[name])
        assert_same_state(fresh.state.get(copies[name], {}), optimizer.state.get(pruned[name], {}))


@pytest.mark.parametrize("case", [Case(torch.optim.AdamW), Case(torch.optim.SGD, momentum=0.9), *ADAFACTORS], ids=str)
def test_two_prunes_equal_one_by_the_composed_order(case: Case) -> None:
    twice, first = case.trained()
    once, second = case.trained()
    later = LayerPlan(experts_before=PLAN.experts_after, order=(2, 3))
    twice = prune_(first, prune_(first, twice), later)
    once = prune_(second, once, PLAN.then(later))
    for name in LAYOUTS:
        assert torch.equal(twice[name], once[name])
        assert_same_state(first.state[twice[name]], second.state[once[name]])


def test_slots_group_entries_names_and_state_order_are_kept() -> None:
    parameters, _ = Case(torch.optim.AdamW).trained(0)
    named = list(parameters.items())
    optimizer = torch.optim.AdamW(
        [{"params": named[:3], "lr": 1e-3}, {"params": named[3:], "lr": 5e-4, "mine": "kept"}]
    )
    step(optimizer, parameters, gradients(torch.float32, 0))
    before, lists = optimizer.state_dict(), [id(group["params"]) for group in optimizer.param_groups]
    pruned = prune_(optimizer, parameters)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert list(after["state"]) == list(before["state"])
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(pruned[n]) for n in LAYOUTS]
    assert [id(group["params"]) for group in optimizer.param_groups] == lists


def test_an_lr_scheduler_goes_on_as_if_nothing_had_happened() -> None:
    rates = []
    for prune in (False, True):
        parameters, optimizer = Case(torch.optim.SGD, lr=0.1, momentum=0.9).trained()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for i in range(5):
            optimizer.step()
            scheduler.step()
            if prune and i == 1:
                prune_(optimizer, parameters)
        rates.append((scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]))
    assert rates[0] == rates[1]
    assert rates[1][0][0] < 0.1


def test_a_grad_scaler_goes_on_and_skips_a_step_with_inf_as_before() -> None:
    parameters, optimizer = Case(torch.optim.AdamW).trained(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    def scaled_step(current: Parameters, factor: float) -> None:
        for parameter in current.values():
            parameter.grad = scaler.scale(factor * parameter.detach())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled_step(parameters, 1.0)
    pruned = prune_(optimizer, parameters)
    before = pruned["expert"].detach().clone()
    scaled_step(pruned, 1.0)
    assert scaler.get_scale() == 8.0  # grew after two good steps, one before and one after the surgery
    stepped = pruned["expert"].detach().clone()
    assert not torch.equal(stepped, before)
    scaled_step(pruned, math.inf)
    assert scaler.get_scale() == 4.0
    assert torch.equal(pruned["expert"], stepped)


def test_the_wrapper_of_accelerate_is_opened() -> None:
    accelerate = importlib.import_module("accelerate")
    parameters, optimizer = Case(torch.optim.AdamW).trained()
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    try:
        assert unwrap(wrapped) is optimizer
        check_optimizer(wrapped)
        pruned = prune_(wrapped, parameters)
        step(wrapped, pruned, {n: kept(n, g) for n, g in gradients(torch.float32, 7).items()})
        assert optimizer.state[pruned["expert"]]["step"] == 4
        assert optimizer_state_bytes(wrapped) == optimizer_state_bytes(optimizer) > 0
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_memory_of_state_and_old_parameters_is_given_back() -> None:
    old = nn.Parameter(torch.zeros(E, 8))
    optimizer = torch.optim.AdamW([old])
    old.grad = torch.ones(E, 8)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * E * 8 * 4 + 4  # two moments and one float32 step
    new, gone = nn.Parameter(torch.zeros(2, 8)), weakref.ref(old)
    spec = ExpertTensor(name="router", axis=ExpertAxis(dim=0))
    plan = LayerPlan(experts_before=E, order=(3, 1))
    replace_parameters_(optimizer, [Replacement(old=old, new=new, spec=spec, layer_plan=plan)])
    assert optimizer_state_bytes(optimizer) == 2 * 2 * 8 * 4 + 4
    del old
    gc.collect()
    assert gone() is None


def test_step_counters_are_copies_on_the_same_device_as_before() -> None:
    parameters = {name: nn.Parameter(torch.empty(LAYOUTS[name][0], device="meta")) for name in LAYOUTS}
    optimizer = torch.optim.AdamW(list(parameters.values()))
    counter = torch.zeros((), device="meta")  # what capturable and fused keep on the device of the parameter
    optimizer.state[parameters["expert"]] = {"step": counter, "exp_avg": torch.empty(E, 3, 5, device="meta")}
    optimizer.state[parameters["bias"]] = {"step": 3}  # a plain number, as transformers' Adafactor has it
    pruned = prune_(optimizer, parameters)
    moved = optimizer.state[pruned["expert"]]
    assert moved["step"] is not counter
    assert moved["step"].device.type == moved["exp_avg"].device.type == "meta"
    assert optimizer.state[pruned["bias"]] == {"step": 3}


def test_parameters_that_are_frozen_or_not_stepped_yet_get_no_state() -> None:
    parameters, _ = Case(torch.optim.AdamW).trained(0)
    parameters["router"].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for n, p in parameters.items() if n != "router"])
    with pytest.raises(SecateurError, match="names expert 6"):  # checked although there is no state to gather
        replace_parameters_(optimizer, [dataclasses.replace(replacement(parameters, "expert"), layer_plan=OUTSIDE)])
    pruned = prune_(optimizer, parameters)
    assert len(optimizer.state) == 0
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for n, p in pruned.items() if n != "router"]


def test_a_momentum_buffer_that_is_none_stays_none() -> None:
    parameters, optimizer = Case(torch.optim.SGD, lr=0.1, momentum=0.9).trained(0)
    optimizer.state[parameters["expert"]]["momentum_buffer"] = None
    assert optimizer.state[prune_(optimizer, parameters)["expert"]] == {"momentum_buffer": None}


def fake(name: str, **attributes: Any) -> torch.optim.Optimizer:
    """An optimizer of a class named like one whose package is not installed."""
    module, _, cls = name.rpartition(".")
    made = type(cls, (torch.optim.Optimizer,), {"__module__": module, "__qualname__": cls})
    optimizer: torch.optim.Optimizer = made([nn.Parameter(torch.zeros(E, 2))], {})
    for key, value in attributes.items():
        setattr(optimizer, key, value)
    return optimizer


APEX = "apex.optimizers.fused_adam.FusedAdam"
ANY_PRECISION = "torchdistx.optimizers.anyprecision_optimizer.AnyPrecisionAdamW"


@pytest.mark.parametrize(
    ("name", "keys"),
    [(APEX, ["exp_avg", "exp_avg_sq"]), (ANY_PRECISION, ["exp_avg", "exp_avg_sq", "compensation"])],
)
def test_optimizers_of_packages_not_installed_are_covered_by_name(name: str, keys: list[str]) -> None:
    optimizer = fake(name, master_weights=False)
    (old,) = optimizer.param_groups[0]["params"]
    optimizer.state[old] = {key: torch.randn(E, 2, dtype=torch.bfloat16) for key in keys}
    expected = {key: value[[5, 2]] for key, value in optimizer.state[old].items()}
    new = nn.Parameter(torch.zeros(2, 2))
    spec = ExpertTensor(name="router", axis=ExpertAxis(dim=0))
    plan = LayerPlan(experts_before=E, order=(5, 2))
    replace_parameters_(optimizer, [Replacement(old=old, new=new, spec=spec, layer_plan=plan)])
    assert_same_state(optimizer.state[new], expected)


class MyAdamW(torch.optim.AdamW):
    pass


def refused() -> Iterator[tuple[torch.optim.Optimizer, str]]:
    def weights() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(2, 2))]

    yield torch.optim.LBFGS(weights()), r"torch\.optim\.lbfgs\.LBFGS: its state is a history"
    for cls in (
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.ASGD,
        MyAdamW,
    ):
        yield (
            cls(weights()),
            rf"{cls.__name__}: no rule says .*a subclass needs .*expected one of torch\.optim\.adam\.Adam, ",
        )
    yield fake("bitsandbytes.optim.adamw.AdamW8bit"), "quantised in blocks"
    yield fake("torchao.optim.adam.AdamW4bit"), "quantised in blocks"
    yield fake("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"), "flattened or partitioned"
    yield fake("accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper"), "flattened or partitioned"
    yield fake("torch_npu.optim.npu_fused_adamw.NpuFusedAdamW"), "combined copies"
    yield fake(APEX, master_weights=True), "master_weights is set"
    yield fake("torch.optim.adamw.AdamW", _amp_stash=object()), "_amp_stash is set"
    special = fake("torch.optim.adamw.AdamW")
    special.param_groups[0]["params"].append(type("Sharded", (nn.Parameter,), {})(torch.zeros(2, 3)))
    yield special, r"param group 0 holds a .*Sharded of shape \(2, 3\), expected plain parameters"


@pytest.mark.parametrize(("optimizer", "message"), list(refused()), ids=lambda v: v if isinstance(v, str) else "")
def test_an_optimizer_that_no_rule_covers_is_refused_by_name(optimizer: torch.optim.Optimizer, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        check_optimizer(optimizer)
    with pytest.raises(SecateurError, match=message):
        replace_parameters_(optimizer, [])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "surprise",
            torch.zeros(E),
            r"AdamW, parameter last of shape .* state 'surprise': unknown key, expected one of",
        ),
        ("exp_avg", torch.zeros(5, 3, E), r"state 'exp_avg': found shape \(5, 3, 6\), expected .* \(3, 5, 6\)"),
        ("exp_avg_sq", torch.zeros(()), r"state 'exp_avg_sq': found shape \(\), expected"),
        ("exp_avg", None, r"state 'exp_avg': found a builtins\.NoneType"),
        ("step", torch.zeros(E), r"state 'step': found shape \(6,\), expected a tensor of shape \(\)"),
        ("step", "3", r"state 'step': found a builtins\.str"),
    ],
)
def test_state_that_the_rule_does_not_expect_is_refused_and_nothing_changes(key: str, value: Any, message: str) -> None:
    parameters, optimizer = Case(torch.optim.AdamW).trained()
    optimizer.state[parameters["last"]][key] = value
    before = snapshot(optimizer)
    with pytest.raises(SecateurError, match=message):
        prune_(optimizer, parameters)
    assert snapshot(optimizer) == before


def test_a_factored_state_on_a_vector_is_refused() -> None:
    parameters, optimizer = Case(transformers.Adafactor).trained()
    optimizer.state[parameters["bias"]]["exp_avg_sq_row"] = torch.zeros(())
    with pytest.raises(SecateurError, match="'exp_avg_sq_row': expected only for parameters of 2 or more axes"):
        prune_(optimizer, parameters)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"new": nn.Parameter(torch.zeros(4, 8))},
            r"router: shape of the new parameter is \(4, 8\), expected \(4, 7\)",
        ),
        ({"new": nn.Parameter(torch.zeros(4, 7).double())}, r"dtype .* is torch\.float64, expected torch\.float32"),
        ({"new": nn.Parameter(torch.zeros(4, 7, device="meta"))}, "device .* is meta, expected cpu"),
        ({"new": nn.Parameter(torch.zeros(4, 7), requires_grad=False)}, "requires_grad .* is False, expected True"),
        ({"new": torch.zeros(4, 7)}, "class of the new parameter"),
        ({"layer_plan": dataclasses.replace(PLAN, experts_before=5)}, "router: axis 0 .* has 6 entries, expected 5"),
        ({"layer_plan": OUTSIDE}, "names expert 6"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused_and_nothing_changes(wrong: dict[str, Any], message: str) -> None:
    parameters, optimizer = Case(torch.optim.AdamW).trained()
    before = snapshot(optimizer)
    good, bad = replacement(parameters, "expert"), dataclasses.replace(replacement(parameters, "router"), **wrong)
    with pytest.raises(SecateurError, match=message):
        replace_parameters_(optimizer, [good, bad])
    assert snapshot(optimizer) == before


def test_parameters_used_twice_are_refused_and_nothing_changes() -> None:
    parameters, optimizer = Case(torch.optim.AdamW).trained()
    before = snapshot(optimizer)
    router, expert = replacement(parameters, "router"), replacement(parameters, "expert")
    frozen = nn.Parameter(torch.zeros(E, 7))
    for replacements, message in [
        ([router, router], "router: replaced twice"),
        ([expert, dataclasses.replace(router, new=expert.new)], "router: its new parameter is in use already"),
        ([dataclasses.replace(router, new=parameters["bias"])], "router: its new parameter is in use already"),
        ([dataclasses.replace(router, old=frozen, new=frozen, layer_plan=LayerPlan.identity(E))], "in use already"),
    ]:
        with pytest.raises(SecateurError, match=message):
            replace_parameters_(optimizer, replacements)
    assert snapshot(optimizer) == before

    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [parameters["router"]]})
    with pytest.raises(SecateurError, match="router: fills 2 slots of the param groups, expected one"):
        replace_parameters_(optimizer, [expert, router])
    assert optimizer.param_groups[0]["params"][1] is parameters["expert"]
