"""Give an optimizer pruned parameters in place of the old ones, state included, so that training goes on.

One explicit rule per optimizer class and state key (OPTIMIZER_RULES); shapes are checked against the rule, never used
to guess it. To support another optimizer, add its class and state keys to that table and a case to the test.

What the rules promise: for Adam, AdamW, SGD and RMSprop every state entry belongs to one parameter entry, so gathering
and then stepping equals stepping and then gathering, bit for bit. (One exception: fused CPU kernels may round the last
entries of a tensor, those that do not fill a vector, otherwise than the same entries elsewhere.) Not for Adafactor:
means over several experts scale its update. Where it has averaged the expert axis away (the column factor of a router
(E, H), say) that state is kept as it is: it forgets the dropped experts at the optimizer's own decay rate. Nor for
Muon, whose update of a router makes all its rows orthogonal together; its state, the momentum, is gathered exactly.

What needs nothing done:
  LR schedulers hold param groups, whose entries other than "params" are not touched, and no parameter.
  GradScaler holds its scale and, from unscale_() to update(), a found-inf flag per optimizer; no parameter either.
Gradients are not moved: call after optimizer.step() (and scaler.update()), where the old ones have been used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor, check_axis, gather, row_index
from secateur.plans import LayerPlan

Shape = tuple[int, ...]
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]  # one, or all that train one model
# (shape of the parameter, its expert axis) -> (shape of the state, its expert axis or None where it is averaged away)
Layout = Callable[[Shape, int], tuple[Shape, int | None]]


@dataclass(frozen=True, kw_only=True)
class StateRule:
    """How one entry of a parameter's optimizer state follows its experts.

    layout: None for a scalar (0-dim tensor or number), which is copied. min_dims: the least number of axes of a
    parameter that can have this entry. none_ok: the entry may be None, and stays so.
    """

    layout: Layout | None
    min_dims: int = 0
    none_ok: bool = False


def _like_parameter(shape: Shape, dim: int) -> tuple[Shape, int | None]:
    return shape, dim


def _averaged_over(axis_from_end: int, *, keep_axis: bool) -> Layout:
    def layout(shape: Shape, dim: int) -> tuple[Shape, int | None]:
        axis = len(shape) - axis_from_end
        state_shape = shape[:axis] + ((1,) if keep_axis else ()) + shape[axis + 1 :]
        if dim == axis:
            return state_shape, None
        return state_shape, dim - 1 if dim > axis and not keep_axis else dim

    return layout


SCALAR = StateRule(layout=None)
LIKE_PARAMETER = StateRule(layout=_like_parameter)
LIKE_PARAMETER_OR_NONE = StateRule(layout=_like_parameter, none_ok=True)
# Adafactor, arXiv 1804.04235, section 3: R averages the last axis away, C the one before it.
FACTORED_ROW = StateRule(layout=_averaged_over(1, keep_axis=False), min_dims=2)
FACTORED_COLUMN = StateRule(layout=_averaged_over(2, keep_axis=False), min_dims=2)
FACTORED_ROW_KEEPDIM = StateRule(layout=_averaged_over(1, keep_axis=True), min_dims=2)
FACTORED_COLUMN_KEEPDIM = StateRule(layout=_averaged_over(2, keep_axis=True), min_dims=2)

_ADAM = {"step": SCALAR, "exp_avg": LIKE_PARAMETER, "exp_avg_sq": LIKE_PARAMETER, "max_exp_avg_sq": LIKE_PARAMETER}

# By exact class, "module.qualname": optional packages are not imported, and a subclass, which may keep other state,
# needs a line of its own.
OPTIMIZER_RULES: Mapping[str, Mapping[str, StateRule]] = MappingProxyType(
    {
        "torch.optim.adam.Adam": _ADAM,
        "torch.optim.adamw.AdamW": _ADAM,
        "torch.optim.Muon": {"momentum_buffer": LIKE_PARAMETER},
        "torch.optim.sgd.SGD": {"momentum_buffer": LIKE_PARAMETER_OR_NONE},
        "torch.optim.rmsprop.RMSprop": {
            "step": SCALAR,
            "square_avg": LIKE_PARAMETER,
            "momentum_buffer": LIKE_PARAMETER,
            "grad_avg": LIKE_PARAMETER,
        },
        "torch.optim.Adafactor": {
            "step": SCALAR,
            "variance": LIKE_PARAMETER,
            "row_var": FACTORED_ROW_KEEPDIM,
            "col_var": FACTORED_COLUMN_KEEPDIM,
        },
        "transformers.optimization.Adafactor": {
            "step": SCALAR,
            "RMS": SCALAR,  # of the whole parameter; computed anew at the start of every step
            "exp_avg": LIKE_PARAMETER,
            "exp_avg_sq": LIKE_PARAMETER,
            "exp_avg_sq_row": FACTORED_ROW,
            "exp_avg_sq_col": FACTORED_COLUMN,
        },
        "apex.optimizers.fused_adam.FusedAdam": {"exp_avg": LIKE_PARAMETER, "exp_avg_sq": LIKE_PARAMETER},
        "torchdistx.optimizers.anyprecision_optimizer.AnyPrecisionAdamW": {
            "step": SCALAR,
            "exp_avg": LIKE_PARAMETER,
            "exp_avg_sq": LIKE_PARAMETER,
            "compensation": LIKE_PARAMETER,
        },
    }
)

_BLOCKS = "its state may be quantised in blocks that do not end where an expert ends"
_PARTITIONS = "it holds flattened or partitioned copies of the parameters, not the parameters"
_LOW_RANK = "its state is a low-rank projection of the gradient, which has no expert axis"
_IN_BACKWARD = "it updates the parameters during the backward pass and keeps its state elsewhere"

# First match wins. Only for a better message: a class without a rule is refused all the same.
REFUSED: tuple[tuple[str, str], ...] = (
    ("bitsandbytes.*", _BLOCKS),
    ("torchao.*", _BLOCKS),
    ("torch.optim*.LBFGS", "its state is a history of one flat vector over all parameters"),
    ("*deepspeed.*", _PARTITIONS),
    ("*megatron*", _PARTITIONS),
    ("torch.distributed.*", _PARTITIONS),
    ("torch_npu.*", "it steps on combined copies of its state, not on the state of each parameter"),
    ("transformer_engine.*", "it keeps scale factors of its state outside that state"),
    ("galore_torch.*", _LOW_RANK),
    ("lomo_optim.*", _IN_BACKWARD),
    ("transformers.trainer_pt_utils.LayerWiseDummyOptimizer", _IN_BACKWARD),
)

# Set when copies of the parameters are kept elsewhere: by apex FusedAdam, by older ones, by what apex.amp patched.
_HIDDEN_COPIES = ("master_weights", "use_master", "_amp_stash")
# what a Trainer and Lightning hand out, each with the optimizer itself as `optimizer`
_WRAPPERS = (
    "accelerate.optimizer.AcceleratedOptimizer",
    "*lightning*.core.optimizer.Lightning*",
    "lightning*.fabric.wrappers.*Fabric*",
)
_DTENSOR = "torch.distributed.tensor.DTensor"  # a sharded parameter; its state is sharded alike


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement:
    """One parameter and its pruned successor.

    old: has layer_plan.experts_before experts laid out as `spec` says.
    new: a Parameter of its own with the experts that the plan keeps; same dtype, device and requires_grad.
    stays: the old object stays in its slot, and the caller gives it the value of `new` afterwards.
    gather_state: how the state follows where plain indexing cannot: (state tensor, its ExpertTensor) -> its successor.
    """

    old: nn.Parameter
    new: nn.Parameter
    spec: ExpertTensor
    layer_plan: LayerPlan
    gather_state: Callable[[Tensor, ExpertTensor], Tensor] | None = None
    stays: bool = False

    @property
    def kept(self) -> nn.Parameter:
        """The object that is trained from now on."""
        return self.old if self.stays else self.new


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper of accelerate (which a Trainer hands to callbacks) or Lightning; else itself."""
    while any(fnmatchcase(_class_name(optimizer), pattern) for pattern in _WRAPPERS):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def each_of(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """All optimizers of a model, without their wrappers.

    Raises:
        SecateurError: something among them is no optimizer.
    """
    given = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    for one in given:
        if not isinstance(unwrap(one), torch.optim.Optimizer):
            raise SecateurError(f"optimizer: found a {_class_name(one)}, expected optimizers of torch")
    return tuple(unwrap(one) for one in given)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise SecateurError, naming the class, the reason and the supported ones, unless a rule covers this optimizer.

    For the start of training: also refuses hidden copies of parameters and sharded, flattened or quantised parameters.
    """
    inner = unwrap(optimizer)
    name = _class_name(inner)
    if name not in OPTIMIZER_RULES:
        reasons = (reason for pattern, reason in REFUSED if fnmatchcase(name, pattern))
        reason = next(reasons, "no rule says how its state follows the experts (a subclass needs its own rule)")
        raise SecateurError(f"optimizer {name}: {reason}; expected one of {', '.join(OPTIMIZER_RULES)}")
    for setting in _HIDDEN_COPIES:
        if getattr(inner, setting, None):
            raise SecateurError(f"optimizer {name}: {setting} is set, it keeps copies of the parameters; expected none")
    for index, group in enumerate(inner.param_groups):
        for parameter in group["params"]:
            if type(parameter) not in (nn.Parameter, Tensor) and _class_name(parameter) != _DTENSOR:
                raise SecateurError(
                    f"optimizer {name}: param group {index} holds a {_class_name(parameter)} of shape"
                    f" {tuple(parameter.shape)}, expected plain parameters"
                )


def replace_parameters_(optimizer: Optimizers, replacements: Sequence[Replacement]) -> None:
    """Put every replacement.new into the slot of replacement.old and move the optimizer state along, in place.

    The order of the parameters, the other entries of the param groups and all other parameters' state stay as they are.
    A parameter in no group (frozen) or without state yet (no step so far) is fine. Everything is checked first, then
    all new state is computed, then it is put in place, so an error, out of memory included, leaves all optimizers as
    they were; until it returns, old and new state of the replaced parameters are both in memory.

    Raises SecateurError when an optimizer is not covered (check_optimizer), a replacement does not fit its spec or
    appears twice, a parameter fills several slots, or a state key or shape is not the one the rule expects.
    """
    changes = [_prepared(one, replacements) for one in each_of(optimizer)]
    for change in changes:
        change()


def _prepared(optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement]) -> Callable[[], None]:
    """What puts the replacements into one optimizer, and cannot fail; all is checked and computed now."""
    check_optimizer(optimizer)
    name = _class_name(optimizer)
    slots = _slots(optimizer)
    _check_distinct(name, replacements, slots, known={*slots, *optimizer.state})
    axes: dict[Tensor, dict[str, int | None]] = {}
    for r in replacements:
        _check_replacement(r)
        axes[r.old] = dict(_state_axes(name, r, optimizer.state.get(r.old, {})))
    new_parameters: dict[Tensor, nn.Parameter] = {r.old: r.kept for r in replacements}
    new_states: dict[Tensor, dict[str, Any]] = {
        r.old: {key: _follow(optimizer.state[r.old][key], axis, r, key) for key, axis in axes[r.old].items()}
        for r in replacements
    }

    def change() -> None:
        for old, new in new_parameters.items():
            for params, position in slots.get(old, ()):
                params[position] = new
        # rebuilt, so that entries keep their order in state_dict()
        items = [(new_parameters.get(p, p), new_states.get(p, state)) for p, state in optimizer.state.items()]
        optimizer.state.clear()
        optimizer.state.update(items)

    return change


def optimizer_state_bytes(optimizer: Optimizers) -> int:
    """Bytes of all tensors in the state of the optimizers, step counters included; parameters are not counted."""
    states = [state for one in each_of(optimizer) for state in one.state.values()]
    return sum(t.numel() * t.element_size() for t in _tensors(states))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


_Slots = dict[Tensor, list[tuple[list[Tensor], int]]]  # parameter -> the lists of parameters it is in, and where


def _slots(optimizer: torch.optim.Optimizer) -> _Slots:
    slots: _Slots = {}
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            slots.setdefault(parameter, []).append((group["params"], position))
    return slots


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_distinct(name: str, replacements: Sequence[Replacement], slots: _Slots, known: set[Tensor]) -> None:
    seen: set[Tensor] = set()
    for r in replacements:
        where = f"optimizer {name}, parameter {r.spec.name}"
        if (num_slots := len(slots.get(r.old, ()))) > 1:
            raise SecateurError(f"{where}: fills {num_slots} slots of the param groups, expected one")
        if r.old in seen:
            raise SecateurError(f"{where}: replaced twice, expected once")
        seen.add(r.old)
        if r.new in known or r.new in seen:
            raise SecateurError(f"{where}: its new parameter is in use already, expected one of its own")
        seen.add(r.new)


def _check_replacement(r: Replacement) -> None:
    check_axis(r.old.shape, r.spec, r.layer_plan.experts_before)
    row_index(r.layer_plan, r.spec)
    kept = r.spec.axis.resized(r.old.shape, r.layer_plan.experts_after)
    expected = (type(r.old), kept, r.old.dtype, r.old.device, r.old.requires_grad)
    found = (type(r.new), tuple(r.new.shape), r.new.dtype, r.new.device, r.new.requires_grad)
    for what, is_, should in zip(("class", "shape", "dtype", "device", "requires_grad"), found, expected, strict=True):
        if is_ != should:
            raise SecateurError(f"{r.spec.name}: {what} of the new parameter is {is_}, expected {should}")


def _state_axes(name: str, r: Replacement, state: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """For each state entry of one parameter, its expert axis; None where there is none. Checks each by its rule."""
    rules = OPTIMIZER_RULES[name]
    shape = tuple(r.old.shape)
    for key, value in state.items():
        where = f"optimizer {name}, parameter {r.spec.name} of shape {shape}, state {key!r}"
        rule = rules.get(key)
        if rule is None:
            raise SecateurError(f"{where}: unknown key, expected one of {', '.join(rules)}")
        if len(shape) < rule.min_dims:
            raise SecateurError(f"{where}: expected only for parameters of {rule.min_dims} or more axes")
        if (value is None and rule.none_ok) or (rule.layout is None and isinstance(value, int | float)):
            yield key, None
            continue
        expected, axis = rule.layout(shape, r.spec.axis.dim) if rule.layout else ((), None)
        # a scalar is a plain tensor, all else is sharded exactly where the parameter is
        kind = type(r.old.data) if rule.layout else Tensor
        if type(value) is not kind or tuple(value.shape) != expected:
            found = f"shape {tuple(value.shape)}" if type(value) is kind else f"a {_class_name(value)}"
            raise SecateurError(f"{where}: found {found}, expected a tensor of shape {expected}")
        yield key, axis


def _follow(value: Any, axis: int | None, r: Replacement, key: str) -> Any:
    if axis is not None:
        spec = ExpertTensor(name=f"{r.spec.name}.{key}", axis=replace(r.spec.axis, dim=axis))
        return r.gather_state(value, spec) if r.gather_state else gather(value, spec, r.layer_plan)
    return value.detach().clone() if isinstance(value, Tensor) else value
