"""The value `Plan`: the plans of all layers, who decided them, and what becomes of the routers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.plans import file
from secateur.plans.checks import checked_layer, layer_id
from secateur.plans.layer import LayerPlan

# What becomes of an expert whose slot goes, beside its weights.
REROUTE = "reroute"  # its rows of the router are cut: tokens go to the next experts, and other weights may change
ZERO_SLOT = "zero-slot"  # the router stays whole: what it sends there contributes nothing, other weights stay
MAPPED = "mapped"  # the router stays whole: what it sends there goes to the expert that absorbed it, gates add up
REMOVED = (REROUTE, ZERO_SLOT)  # those that a command can be asked for (arXiv 2405.16646 and its authors' code)
MEANINGS = (*REMOVED, MAPPED)
MIXED = "mixed"  # of composed plans, in which several happen

# What the router row of a merged expert is, where rows are cut.
REPRESENTATIVE = "representative"  # the row of the expert whose place it takes
MEAN = "mean"  # the rows of its sources, by their weights
SUM = "sum"  # the rows of its sources, added up
ROWS = (REPRESENTATIVE, MEAN, SUM)

CONVEX = "convex"  # weights of an entry are not below 0 and sum up to 1
FREE = "free"  # they are any finite numbers
WEIGHTS = (CONVEX, FREE)

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to the experts of a model.

    Args:
        layers: layer id -> LayerPlan; a layer that is not listed is untouched.
        criterion: the name of what decided.
        details: how it decided; anything JSON can hold. Stored as JSON holds it, so that a plan equals itself read
            back from a file: tuples become lists, keys strings, and infinity the string "inf".
        stats_digest: `RouterStats.digest()` of the statistics the decision was made on.
        removed: what becomes of an expert whose slot goes, one of MEANINGS; None leaves it to who applies the plan, and
            is REROUTE in the end. MIXED for composed plans in which several happened, which can only be looked at.
        rows: what the router row of a merged expert is, one of ROWS; MIXED as above. REPRESENTATIVE where nothing is
            merged.
        weights: CONVEX, or FREE where entries may have weights that do not sum up to 1, or below 0.

    Raises:
        SecateurError: an id out of range or listed twice, a layer that keeps nothing, sources that do not fit (see
            `LayerPlan`), a mapped slot with two targets, a detail that is not JSON.
    """

    layers: dict[int, LayerPlan]
    criterion: str
    details: dict[str, JSON] = field(default_factory=dict)
    stats_digest: str | None = None
    removed: str | None = None
    rows: str = REPRESENTATIVE
    weights: str = CONVEX

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not isinstance(self.details, Mapping):
            raise SecateurError("plan: layers and details must be mappings")
        for name, known in (("rows", (*ROWS, MIXED)), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise SecateurError(f"plan: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for layer, plan in self.layers.items():
            if not isinstance(plan, LayerPlan):
                raise SecateurError(f"plan, layer {layer!r}: found {plan!r}, expected a LayerPlan")
        tidy = {
            layer_id(layer): checked_layer(layer, plan, weights_are_free=self.weights == FREE)
            for layer, plan in self.layers.items()
        }
        object.__setattr__(self, "layers", dict(sorted(tidy.items())))
        if not self.merges:  # then no row is merged
            object.__setattr__(self, "rows", REPRESENTATIVE)
        object.__setattr__(self, "details", _as_json(self.details, "details"))
        self.validate()

    @property
    def is_identity(self) -> bool:
        """True when every expert stays where it is, as it was."""
        return all(layer_plan.is_identity for layer_plan in self.layers.values())

    @property
    def is_copy(self) -> bool:
        """True when every new expert is one old expert as it was, with its row of the router."""
        return all(layer_plan.is_copy for layer_plan in self.layers.values())

    def beyond_copies(self) -> str | None:
        """The first thing in it that is more than to keep, drop or move whole experts, in words; None without any."""
        for layer, layer_plan in self.layers.items():
            for new, entry in layer_plan.sources.items():
                made = ", ".join(str(source.expert) for source in entry)
                if len(entry) > 1 or entry[0].weight != 1:
                    return f"layer {layer}: the new expert {new} is mixed from {made}"
                return f"layer {layer}: of expert {made} some neurons are kept, or all in another order"
            for name in layer_plan.solved:
                return f"layer {layer}: {name} was solved for"
        return "slots of routers are mapped to the experts that absorbed theirs" if self.removed == MAPPED else None

    @property
    def merges(self) -> bool:
        """True when a new expert is made of several old ones."""
        return any(layer_plan.merges for layer_plan in self.layers.values())

    @property
    def leaves_zero_slots(self) -> bool:
        """True when the routers stay as they are, and what they send to a dropped expert contributes nothing."""
        return self.removed == ZERO_SLOT

    def validate(self) -> None:
        """Check what the layers are together; see the class for what is an error."""
        if not self.layers:
            raise SecateurError("plan: it names no layer, expected at least one")
        if not isinstance(self.criterion, str) or not self.criterion:
            raise SecateurError(f"plan: criterion is {self.criterion!r}, expected a name")
        if self.stats_digest is not None and not isinstance(self.stats_digest, str):
            raise SecateurError(f"plan: stats_digest is {self.stats_digest!r}, expected a string or nothing")
        if self.removed not in (None, *MEANINGS, MIXED):
            raise SecateurError(f"plan: removed is {self.removed!r}, expected {' or '.join(MEANINGS)}")
        if self.removed == MAPPED or self.rows == SUM:
            for layer, layer_plan in self.layers.items():
                _check_one_target(layer, layer_plan)

    def filled(self, counts: Mapping[int, int]) -> Plan:
        """The same plan, listing every layer of a model with these expert counts: those it left out stay as they are.

        For a room that applies it; what is saved is the plan that was given.
        """
        untouched = {layer: LayerPlan.identity(count) for layer, count in counts.items() if layer not in self.layers}
        return replace(self, layers=self.layers | untouched) if untouched else self

    def compose(self, later: Plan) -> Plan:
        """This plan, then `later` on its result, as one plan from this plan's ids.

        A layer that only one of the two lists is untouched by the other. Sources, weights and neurons are those of the
        sources' sources. The decisions of both are kept in `details["steps"]`, in order.

        Raises:
            SecateurError: `later` starts from another number of experts or neurons than this plan leaves, or one of the
                two has solved matrices.
        """
        layers = dict(self.layers)
        for layer, second in later.layers.items():
            first = self.layers.get(layer)
            try:
                layers[layer] = second if first is None else first.then(second)
            except SecateurError as error:
                raise SecateurError(f"layer {layer}: {error}") from None
        same = (self.removed or REROUTE) == (later.removed or REROUTE)
        return Plan(
            layers=layers,
            criterion="composed",
            details={"steps": [*self._steps(), *later._steps()]},
            removed=self.removed or later.removed if same else MIXED,
            rows=self._rows_with(later),
            weights=FREE if FREE in (self.weights, later.weights) else CONVEX,
        )

    def _rows_with(self, later: Plan) -> str:
        """The rule for rows of both; a plan that merges nothing has none."""
        said = {plan.rows for plan in (self, later) if plan.merges}
        return MIXED if len(said) > 1 else next(iter(said), REPRESENTATIVE)

    def _steps(self) -> list[JSON]:
        if self.criterion == "composed" and isinstance(self.details.get("steps"), list):
            return list(self.details["steps"])  # type: ignore[arg-type]
        return [self._head]

    def _said(self) -> dict[str, JSON]:
        """Only what the plan says beside the usual, so that other plans stay readable for earlier versions."""
        usual = {"removed": None, "rows": REPRESENTATIVE, "weights": CONVEX}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    def invert(self) -> Plan:
        """The plan that undoes a re-ordering: `plan.compose(plan.invert())` keeps every expert where it was.

        Raises:
            SecateurError: a layer drops experts or neurons, or mixes experts, which nothing can undo.
        """
        layers = {}
        for layer, layer_plan in self.layers.items():
            try:
                layers[layer] = layer_plan.inverse()
            except SecateurError as error:
                raise SecateurError(f"layer {layer}: {error}") from None
        return Plan(layers=layers, criterion=f"inverse of {self.criterion}")

    @classmethod
    def identity(cls, experts: Mapping[int, int]) -> Plan:
        """The plan that changes nothing; `experts` is layer -> number of experts."""
        layers = {layer: LayerPlan.identity(count) for layer, count in experts.items()}
        return cls(layers=layers, criterion="identity")

    def describe(self) -> str:
        """A summary for people: one line for the whole, one for each layer."""
        before = sum(layer_plan.experts_before for layer_plan in self.layers.values())
        after = sum(layer_plan.experts_after for layer_plan in self.layers.values())
        lines = [f"{self.criterion}: keeps {after} of {before} experts in {len(self.layers)} layers"]
        lines += [f"removed experts: {self.removed}"] if self.removed is not None else []
        lines += [f"layer {layer}: {_in_words(layer_plan)}" for layer, layer_plan in self.layers.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, JSON]:
        """The plan as its file has it; arrays are in the side file, which is named by its digest."""
        return file.to_json(self._head, self.layers)

    @property
    def _head(self) -> dict[str, JSON]:
        """All that a file has beside the layers."""
        about: dict[str, JSON] = {"criterion": self.criterion, "details": self.details}
        return {**about, "stats_digest": self.stats_digest, **self._said()}

    @classmethod
    def from_json(cls, data: object, side: bytes | None = None) -> Plan:
        """The plan that `to_json` wrote.

        Args:
            side: the content of its side file, where it has one.

        Raises:
            SecateurError: another format or version, a missing or unknown entry, an invalid plan, or a side file that
                is missing or another plan's.
        """
        head, layers = file.from_json(data, side)
        return cls(layers=layers, **head)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, one line for each layer so that two plans can be compared line by line.

        Neurons and solved matrices go into a safetensors file beside it, with the same name.

        Raises:
            SecateurError: that file is there and is something else.
            OSError: the disk refused.
        """
        file.save(Path(path), self._head, self.layers)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file, and the side file beside it where it has one.

        Raises:
            SecateurError: a file cannot be read, is not strict JSON, or is not a valid plan; the message names it.
        """
        data, side = file.load(Path(path))
        try:
            return cls.from_json(data, side)
        except SecateurError as error:
            raise SecateurError(f"plan file {path}: {error}") from error


def _check_one_target(layer: int, layer_plan: LayerPlan) -> None:
    """Each old slot must lead to one new expert, or to none: gates and rows add up, and are added once."""
    targets: dict[int, int] = {}
    for new in range(layer_plan.experts_after):
        for source in layer_plan.made_of(new):
            if targets.setdefault(source.expert, new) != new:
                raise SecateurError(
                    f"plan, layer {layer}: expert {source.expert} is in the new experts {targets[source.expert]} and "
                    f"{new}, but where slots are mapped or rows added up it can be in one only"
                )


def _in_words(layer_plan: LayerPlan) -> str:
    text = f"{layer_plan.experts_before} -> {layer_plan.experts_after}"
    if layer_plan.dropped:
        text += f", drops {' '.join(map(str, layer_plan.dropped))}"
    if layer_plan.width_after is not None:
        text += f", neurons {layer_plan.width_before} -> {layer_plan.width_after}"
    if not layer_plan.is_ascending:
        text += f", new order {' '.join(map(str, layer_plan.order))}"
    for new, entry in layer_plan.sources.items():
        if len({source.expert for source in entry}) > 1:
            text += f", {layer_plan.order[new]} from " + " ".join(f"{s.weight:.3g}*{s.expert}" for s in entry)
    return text + (f", solved for {' '.join(layer_plan.solved)}" if layer_plan.solved else "")


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


def plan_at(path: Path) -> Plan | None:
    """The plan that a file holds; None where it is not there or holds something else."""
    try:
        return Plan.load(path) if path.is_file() else None
    except SecateurError:
        return None
