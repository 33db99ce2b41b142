"""Plan: for each layer, which old expert each new expert is made of. One file format, composition, inversion.

Dropping experts is a shorter `order`, re-placing them a permutation; both are the same value.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_json
from secateur.files.records import Expert, Experts, Layer, Name, as_record

FORMAT = "secateur-plan"
VERSION = 1

# What becomes of a removed expert, beside its weights (arXiv 2405.16646 and its authors' code have both).
REROUTE = "reroute"  # its rows of the router go too: tokens go to the next experts, and other weights may change
ZERO_SLOT = "zero-slot"  # the router stays as it is: what it sends there contributes nothing, other weights stay
REMOVED = (REROUTE, ZERO_SLOT)
MIXED = "mixed"  # of composed plans, in which both happen

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The new experts of one layer: `order[new] = old`, ids from 0 to `experts_before - 1`. `Plan` checks it."""

    experts_before: int
    order: tuple[int, ...]

    @property
    def experts_after(self) -> int:
        return len(self.order)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Old ids that no new expert is made of, ascending."""
        kept = set(self.order)
        return tuple(old for old in range(self.experts_before) if old not in kept)

    @property
    def is_ascending(self) -> bool:
        """True when the kept experts stay in their old relative order."""
        return all(left < right for left, right in itertools.pairwise(self.order))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to the experts of a model.

    Args:
        layers: layer id -> LayerPlan; a layer that is not listed is untouched.
        criterion: the name of what decided.
        details: how it decided; anything JSON can hold. Stored as JSON holds it, so that a plan equals itself read
            back from a file: tuples become lists, keys strings, and infinity the string "inf".
        stats_digest: `RouterStats.digest()` of the statistics the decision was made on.
        removed: what becomes of a removed expert, one of REMOVED; None leaves it to who applies the plan, and is
            REROUTE in the end. MIXED for composed plans in which both happened, which can only be looked at.

    Raises:
        SecateurError: an id out of range or listed twice, a layer that keeps nothing, a detail that is not JSON.
    """

    layers: dict[int, LayerPlan]
    criterion: str
    details: dict[str, JSON] = field(default_factory=dict)
    stats_digest: str | None = None
    removed: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not isinstance(self.details, Mapping):
            raise SecateurError("plan: layers and details must be mappings")
        for layer, plan in self.layers.items():
            if not isinstance(plan, LayerPlan):
                raise SecateurError(f"plan, layer {layer!r}: found {plan!r}, expected a LayerPlan")
        tidy = {
            _index(layer, "plan: a layer id"): LayerPlan(
                experts_before=_index(plan.experts_before, f"plan, layer {layer}: experts_before"),
                order=tuple(_index(old, f"plan, layer {layer}: an expert id in order") for old in plan.order),
            )
            for layer, plan in self.layers.items()
        }
        object.__setattr__(self, "layers", dict(sorted(tidy.items())))
        object.__setattr__(self, "details", _as_json(self.details, "details"))
        self.validate()

    @property
    def is_identity(self) -> bool:
        """True when every expert stays where it is."""
        return all(planned.order == tuple(range(planned.experts_before)) for planned in self.layers.values())

    @property
    def leaves_zero_slots(self) -> bool:
        """True when the routers stay as they are, and what they send to a dropped expert contributes nothing."""
        return self.removed == ZERO_SLOT

    def validate(self) -> None:
        """Check every layer; see the class for what is an error."""
        if not self.layers:
            raise SecateurError("plan: it names no layer, expected at least one")
        if not isinstance(self.criterion, str) or not self.criterion:
            raise SecateurError(f"plan: criterion is {self.criterion!r}, expected a name")
        if self.stats_digest is not None and not isinstance(self.stats_digest, str):
            raise SecateurError(f"plan: stats_digest is {self.stats_digest!r}, expected a string or nothing")
        if self.removed not in (None, *REMOVED, MIXED):
            raise SecateurError(f"plan: removed is {self.removed!r}, expected {' or '.join(REMOVED)}")
        for layer, plan in self.layers.items():
            _validate_layer(layer, plan)

    def compose(self, later: Plan) -> Plan:
        """This plan, then `later` on its result, as one plan from this plan's ids.

        A layer that only one of the two lists is untouched by the other. The decisions of both are kept in
        `details["steps"]`, in order.

        Raises:
            SecateurError: `later` starts from another number of experts than this plan leaves.
        """
        layers = dict(self.layers)
        for layer, second in later.layers.items():
            first = self.layers.get(layer)
            if first is None:
                layers[layer] = second
                continue
            if first.experts_after != second.experts_before:
                raise SecateurError(
                    f"layer {layer}: the later plan starts from {second.experts_before} experts, "
                    f"but the earlier one leaves {first.experts_after}"
                )
            order = tuple(first.order[middle] for middle in second.order)
            layers[layer] = LayerPlan(experts_before=first.experts_before, order=order)
        same = (self.removed or REROUTE) == (later.removed or REROUTE)
        return Plan(
            layers=layers,
            criterion="composed",
            details={"steps": [*self._steps(), *later._steps()]},
            removed=self.removed or later.removed if same else MIXED,
        )

    def _steps(self) -> list[JSON]:
        if self.criterion == "composed" and isinstance(self.details.get("steps"), list):
            return list(self.details["steps"])  # type: ignore[arg-type]
        step = {"criterion": self.criterion, "details": self.details, "stats_digest": self.stats_digest}
        return [step | self._removed_as_json()]

    def _removed_as_json(self) -> dict[str, JSON]:
        """Only where the plan says it, so that other plans stay readable for earlier versions."""
        return {} if self.removed is None else {"removed": self.removed}

    def invert(self) -> Plan:
        """The plan that undoes a re-ordering: `plan.compose(plan.invert())` keeps every expert where it was.

        Raises:
            SecateurError: a layer drops experts, which nothing can undo.
        """
        layers = {}
        for layer, plan in self.layers.items():
            if plan.dropped:
                raise SecateurError(
                    f"layer {layer}: the plan keeps {plan.experts_after} of {plan.experts_before} experts; "
                    "only a permutation can be inverted"
                )
            order = sorted(range(plan.experts_before), key=plan.order.__getitem__)
            layers[layer] = LayerPlan(experts_before=plan.experts_before, order=tuple(order))
        return Plan(layers=layers, criterion=f"inverse of {self.criterion}")

    @classmethod
    def identity(cls, experts: Mapping[int, int]) -> Plan:
        """The plan that changes nothing; `experts` is layer -> number of experts."""
        layers = {layer: LayerPlan(experts_before=count, order=tuple(range(count))) for layer, count in experts.items()}
        return cls(layers=layers, criterion="identity")

    def describe(self) -> str:
        """A summary for people: one line for the whole, one for each layer."""
        before = sum(plan.experts_before for plan in self.layers.values())
        after = sum(plan.experts_after for plan in self.layers.values())
        lines = [f"{self.criterion}: keeps {after} of {before} experts in {len(self.layers)} layers"]
        lines += [f"removed experts: {self.removed}"] if self.removed is not None else []
        for layer, plan in self.layers.items():
            line = f"layer {layer}: {plan.experts_before} -> {plan.experts_after}"
            if plan.dropped:
                line += f", drops {' '.join(map(str, plan.dropped))}"
            if not plan.is_ascending:
                line += f", new order {' '.join(map(str, plan.order))}"
            lines.append(line)
        return "\n".join(lines)

    def to_json(self) -> dict[str, JSON]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "criterion": self.criterion,
            "details": self.details,
            "stats_digest": self.stats_digest,
            **self._removed_as_json(),
            "layers": {
                str(layer): {"experts_before": plan.experts_before, "order": list(plan.order)}
                for layer, plan in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            SecateurError: another format or version, a missing or unknown entry, or an invalid plan.
        """
        file = as_record(data, PlanFile, "plan")
        return cls(
            layers={
                layer: LayerPlan(experts_before=entry.experts_before, order=entry.order)
                for layer, entry in file.layers.items()
            },
            criterion=file.criterion,
            details=file.details,
            stats_digest=file.stats_digest,
            removed=file.removed,
        )

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, one line for each layer so that two plans can be compared line by line."""
        head = self.to_json()
        layers: Any = head.pop("layers")
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in layers.items())
        start = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
        atomic_write(Path(path), f'{start},\n  "layers": {{\n{lines}\n  }}\n}}\n')

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file.

        Raises:
            SecateurError: the file cannot be read, is not strict JSON, or is not a valid plan; the message names it.
        """
        where = f"plan file {path}"
        data = read_json(Path(path), where=where, constants=False)
        try:
            return cls.from_json(data)
        except SecateurError as error:
            raise SecateurError(f"{where}: {error}") from error


class LayerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer of a plan, as its file has it."""

    experts_before: Experts
    order: tuple[Expert, ...]


class PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan as its file has it; what the entries must be together, `Plan` checks."""

    format: Literal["secateur-plan"]
    version: Literal[1]
    criterion: Name
    layers: dict[Layer, LayerEntry]
    details: dict[str, Any] = {}
    stats_digest: str | None = None
    removed: str | None = None


def _validate_layer(layer: int, plan: LayerPlan) -> None:
    if layer < 0:
        raise SecateurError(f"plan: layer id is {layer}, expected 0 or more")
    if not plan.order:
        raise SecateurError(f"plan, layer {layer}: no expert is kept, expected at least one")
    outside = sorted({old for old in plan.order if not 0 <= old < plan.experts_before})
    if outside:
        raise SecateurError(
            f"plan, layer {layer}: expert ids {outside!r:.200} are out of range, "
            f"expected 0 to {plan.experts_before - 1}"
        )
    if twice := sorted(old for old, times in Counter(plan.order).items() if times > 1):
        raise SecateurError(f"plan, layer {layer}: expert ids {twice!r:.200} are listed more than once, expected once")


def _index(value: Any, name: str) -> int:
    """`value` as int when it is one (also from torch or numpy); no bool, no float, no text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise SecateurError(f"{name} is {value!r}, expected an integer") from None


def _as_json(value: Any, name: str) -> Any:
    """`value` as strict JSON holds it."""
    if isinstance(value, float):
        if math.isnan(value):
            raise SecateurError(f"plan: {name} is nan, expected a number")
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    raise SecateurError(f"plan: {name} is {value!r}, expected something JSON can hold")


def layer_plan(plan: Plan, counts: Mapping[int, int], layer: int) -> LayerPlan:
    """The plan of one layer of a model with these expert counts; every expert stays where the plan does not list it."""
    count = counts[layer]
    return plan.layers.get(layer) or LayerPlan(experts_before=count, order=tuple(range(count)))
