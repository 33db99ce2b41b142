"""What a plan changes in a stored checkpoint, entry by entry; every check of the two against each other is here.

Shapes: E experts before, N experts after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor, check_axis
from secateur.plans import LayerPlan, Plan
from secateur.surgery.optimizer import OPTIMIZER_RULES, StateRule
from secateur.training_checkpoint.names import Entry, Naming, Section, understand
from secateur.training_checkpoint.stored import StoredCheckpoint, StoredTensor

# The state of these optimizers follows the experts, but their update does not: it mixes the rows of a matrix.
MIXING_SETTINGS = {"ns_steps": "Muon"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tensor whose experts change: gathered along `spec`'s axis by `layer_plan`, or a counter set to zero."""

    layer: int
    spec: ExpertTensor
    layer_plan: LayerPlan
    to_zero: bool

    def new_shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        return self.spec.axis.resized(tensor.shape, self.layer_plan.experts_after)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """counts: experts of every MoE layer before the change. changes: tensor name -> what becomes of it."""

    counts: Mapping[int, int]
    changes: Mapping[str, Change]


def survey(stored: StoredCheckpoint, naming: Naming, plan: Plan) -> Survey:
    """Find every tensor that the plan changes.

    Raises:
        SecateurError: a name that no rule covers, a layer that is not there or has another number of experts, tensors
            of one layer that disagree, or an optimizer state that no rule covers.
    """
    entries = _entries(naming, [*stored.tensors, *stored.blobs])
    _check_prefixes(entries)
    parts = _parts(entries)
    counts = _counts(stored, naming, entries)
    _check_plan(plan, counts, entries)
    keys: dict[str, set[str]] = {}
    for entry in entries.values():
        if entry.section == "optimizer":
            keys.setdefault(entry.parameter, set()).add(entry.key)
    changes = {}
    for name, entry in entries.items():
        layer_plan = plan.layers.get(entry.layer) if entry.layer is not None else None
        if layer_plan is None or entry.layer is None or layer_plan.is_identity:
            continue
        if entry.section == "settings":
            _check_setting(name, entry, stored)
            continue
        dim: int | None
        if entry.section == "model":
            dim = _axis_of_parameter(name, entry, stored)
        else:
            dim = _axis_of_state(name, entry, _state_rule(name, entry, keys[entry.parameter]), stored, parts)
        if dim is None:
            continue
        spec = _spec(name, entry, dim, stored.tensors[name], layer_plan.experts_before)
        changes[name] = Change(layer=entry.layer, spec=spec, layer_plan=layer_plan, to_zero=entry.role == "counter")
    return Survey(counts=counts, changes=changes)


def _entries(naming: Naming, names: Iterable[str]) -> dict[str, Entry]:
    """What every name says; a name without a rule is an error where it could be an expert's or a router's."""
    found = {name: understand(naming, name) for name in names}
    blocks = {entry.block for entry in found.values() if entry is not None and entry.role is not None}
    entries = {}
    for name, entry in found.items():
        if entry is None or entry.loose_in in blocks:
            raise SecateurError(
                f"{name}: no rule of the naming {naming.name!r} covers it, though it {'is' if entry else 'sounds like'}"
                " a part of a MoE layer; give a file with its name to --names (docs/engines.md)"
            )
        if entry.section == "optimizer" and entry.parameter.isdecimal():
            raise SecateurError(f"{name}: the optimizer's state is numbered; expected the names of the parameters")
        entries[name] = entry
    return entries


def _check_prefixes(entries: Mapping[str, Entry]) -> None:
    """Two sets of layers in one checkpoint would both have a layer 0, and no plan says which it means."""
    prefixes: dict[Section, dict[str, str]] = {}
    for name, entry in entries.items():
        if entry.layer is not None:
            prefixes.setdefault(entry.section, {}).setdefault(entry.prefix, name)
    for found in prefixes.values():
        if len(found) > 1:
            raise SecateurError(f"MoE layers under several paths: {', '.join(found.values())}; expected one")


_Parts = Mapping[tuple[Section, int | None, str, str], str]


def _parts(entries: Mapping[str, Entry]) -> _Parts:
    """(section, layer, name in the block, state key) -> full name."""
    parts: dict[tuple[Section, int | None, str, str], str] = {}
    for name, entry in entries.items():
        if entry.layer is not None:
            other = parts.setdefault((entry.section, entry.layer, entry.part, entry.key), name)
            if other != name:
                raise SecateurError(f"{other} and {name} are the same tensor of layer {entry.layer}, expected one")
    return parts


def _counts(stored: StoredCheckpoint, naming: Naming, entries: Mapping[str, Entry]) -> dict[int, int]:
    """Layer -> experts, on which all its tensors that can tell must agree."""
    found: dict[int, dict[int, str]] = {}
    for name, entry in entries.items():
        if entry.section != "model" and entry.key not in LIKE_PARAMETER_KEYS:
            continue
        if entry.layer is None or not entry.named.rows_known or name not in stored.tensors:
            continue
        axis, shape = entry.named.axis, stored.tensors[name].shape
        dim, rows = axis.dim, axis.rows_per_expert
        count, rest = divmod(shape[dim] - axis.num_trailing, rows) if dim < len(shape) else (0, 0)
        if rest or count < 1:
            raise SecateurError(f"{name}: shape {shape}, expected experts of {rows} rows each on axis {dim}")
        found.setdefault(entry.layer, {})[count] = name
    for layer, counts in found.items():
        if len(counts) != 1:
            listed = ", ".join(f"{count} in {name}" for count, name in counts.items())
            raise SecateurError(f"layer {layer}: its tensors hold different numbers of experts: {listed}")
    if not found:
        raise SecateurError(f"no tensor tells its number of experts by the naming {naming.name!r}")
    return {layer: next(iter(counts)) for layer, counts in sorted(found.items())}


def _check_plan(plan: Plan, counts: Mapping[int, int], entries: Mapping[str, Entry]) -> None:
    roles = {(entry.section, entry.layer, entry.role) for entry in entries.values()}
    has_model = any(entry.section == "model" and entry.role for entry in entries.values())
    for layer, layer_plan in plan.layers.items():
        if layer not in counts:
            raise SecateurError(f"plan: layer {layer} is not a MoE layer; MoE layers are {sorted(counts)}")
        if layer_plan.experts_before != counts[layer]:
            raise SecateurError(
                f"plan: layer {layer} is for {layer_plan.experts_before} experts, the checkpoint has {counts[layer]}"
            )
        for role in ("expert", "router") if has_model else ():
            if ("model", layer, role) not in roles:
                raise SecateurError(f"layer {layer}: the model has no {role} tensor, expected one at least")


def _check_setting(name: str, entry: Entry, stored: StoredCheckpoint) -> None:
    if entry.key in MIXING_SETTINGS:
        raise SecateurError(
            f"{name}: the parameter is updated by {MIXING_SETTINGS[entry.key]}, which mixes all rows of a matrix; "
            f"expected one of {', '.join(OPTIMIZER_RULES)}"
        )
    if name in stored.tensors and stored.tensors[name].shape:
        raise SecateurError(f"{name}: a setting of shape {stored.tensors[name].shape}, expected a number")


def _axis_of_parameter(name: str, entry: Entry, stored: StoredCheckpoint) -> int:
    if name in stored.blobs:
        raise SecateurError(f"{name}: stored as opaque bytes, expected a tensor with an expert axis")
    return entry.named.axis.dim


def _axis_of_state(name: str, entry: Entry, rule: StateRule, stored: StoredCheckpoint, parts: _Parts) -> int | None:
    """The expert axis of an optimizer state; None where it has none."""
    if rule.layout is None:
        if name in stored.tensors and stored.tensors[name].shape:
            raise SecateurError(f"{name}: shape {stored.tensors[name].shape}, expected one number")
        return None
    if name in stored.blobs:
        raise SecateurError(f"{name}: stored as opaque bytes, expected a tensor that follows the parameter")
    shape = _parameter_shape(name, entry, stored, parts)
    if len(shape) < max(rule.min_dims, entry.named.axis.dim + 1):
        raise SecateurError(f"{name}: not expected for a parameter of shape {shape}")
    expected, axis = rule.layout(shape, entry.named.axis.dim)
    if stored.tensors[name].shape != expected:
        raise SecateurError(
            f"{name}: shape {stored.tensors[name].shape}, expected {expected} for a parameter of shape {shape}"
        )
    return axis


def _state_rule(name: str, entry: Entry, keys: set[str]) -> StateRule:
    """The rule of the optimizers that keep just these entries; the class itself is not in a checkpoint."""
    rules = [rules[entry.key] for rules in OPTIMIZER_RULES.values() if keys <= rules.keys()]
    if not rules:
        raise SecateurError(
            f"{name}: the optimizer keeps {sorted(keys)} for this parameter, which is none of the optimizers with a "
            f"rule: {', '.join(OPTIMIZER_RULES)}"
        )
    if len({rule.layout for rule in rules}) != 1:
        raise SecateurError(f"{name}: optimizers with the entries {sorted(keys)} keep it in different shapes")
    return rules[0]


def _parameter_shape(name: str, entry: Entry, stored: StoredCheckpoint, parts: _Parts) -> tuple[int, ...]:
    """From the model where it is in the same checkpoint, else from a state that has the parameter's shape."""
    places: list[tuple[Section, str]] = [("model", ""), *(("optimizer", key) for key in sorted(LIKE_PARAMETER_KEYS))]
    for section, key in places:
        found = parts.get((section, entry.layer, entry.part, key))
        if found is not None and found in stored.tensors:
            return stored.tensors[found].shape
    raise SecateurError(f"{name}: neither the parameter nor a state of its shape is in this checkpoint")


def _spec(name: str, entry: Entry, dim: int, tensor: StoredTensor, num_experts: int) -> ExpertTensor:
    size = tensor.shape[dim] if dim < len(tensor.shape) else 0
    spec = ExpertTensor(name=name, axis=replace(entry.named.in_tensor(size, num_experts), dim=dim))
    check_axis(tensor.shape, spec, num_experts)
    return spec


def _keys_like_the_parameter() -> frozenset[str]:
    probe = (5, 7, 11)
    rules = [item for rules in OPTIMIZER_RULES.values() for item in rules.items()]
    return frozenset(key for key, rule in rules if rule.layout is not None and rule.layout(probe, 0)[0] == probe)


LIKE_PARAMETER_KEYS = _keys_like_the_parameter()
