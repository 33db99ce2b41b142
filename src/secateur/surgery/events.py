"""PruneEvent: what one pruning did to a live model, as a value that training, files and the report share.

It is here, and needs no torch, because the report reads it too, and must not know how a model is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.json import read_json
from secateur.files.limits import SHOWN
from secateur.files.records import Count, Expert, Experts, Finite, Layer, Positive, as_record
from secateur.plans import LayerPlan, Plan
from secateur.surgery.fits import check_copies

if TYPE_CHECKING:
    from secateur.stats import RouterStats

REARRANGE = "rearrange"  # the reason of an event that drops nothing
BALANCES = ("balance_before", "balance_after")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes held by parameters and by optimizer state."""

    parameters_bytes: Count
    optimizer_bytes: Count


@dataclass(frozen=True, kw_only=True)
class LayerEvent:
    """One layer of a pruning. rerouted_share: share of its routed tokens whose expert went."""

    experts_before: Experts
    experts_after: Experts
    dropped: tuple[Expert, ...]
    rerouted_share: Finite


@dataclass(frozen=True, kw_only=True)
class LayerPlacement:
    """How the kept experts of one layer lie on the expert-parallel ranks, for the loads the decision was made on.

    balance_before: busiest rank over the mean with the experts in ascending order; balance_after: as placed.
    over_bound: busiest rank over its lower bound. moved: experts that changed their rank.
    """

    num_ranks: Positive
    balance_before: Finite
    balance_after: Finite
    over_bound: Finite
    moved: Count


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One pruning of a run, or one rearrangement of its experts, which drops none.

    step, tokens: optimizer steps and tokens done. reason: stable, step, tokens or rearrange. loads: {layer: tokens per
    expert} that the decision was made on, in the numbering before it. alpha, beta: thresholds, None where one is off
    (also when given as inf) or a goal was given (the plan's details hold what it comes to). oracle_max_abs_difference:
    largest difference of a logit from the barred-experts oracle on one training sequence (of every rank), None when
    the self-check was off. placement: of each layer; None where experts were not placed on ranks. replaced: {old
    parameter: the new one in its place}, of sharded models alone, and only in the event that `LAEP.step` returns: all
    others keep their parameters, which get new values.
    """

    step: int
    tokens: int
    reason: str
    plan: Plan
    loads: Mapping[int, list[int]]
    layers: Mapping[int, LayerEvent]
    parameters_before: int
    parameters_after: int
    memory_before: Memory
    memory_after: Memory
    alpha: float | None
    beta: float | None
    surgery_seconds: float
    oracle_max_abs_difference: float | None
    placement: Mapping[int, LayerPlacement] | None = None
    replaced: Mapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.alpha == float("inf"):
            object.__setattr__(self, "alpha", None)

    @property
    def experts_before(self) -> int:
        return sum(layer.experts_before for layer in self.layers.values())

    @property
    def experts_after(self) -> int:
        return sum(layer.experts_after for layer in self.layers.values())

    @property
    def rerouted_share(self) -> float:
        """Share of all routed tokens, over all layers, whose expert went."""
        total = sum(sum(loads) for loads in self.loads.values())
        gone = sum(self.loads[layer][old] for layer, layer_event in self.layers.items() for old in layer_event.dropped)
        return gone / total if total else 0.0

    def describe(self) -> str:
        """One line for a log."""
        placed = ""
        if self.placement:
            layers = self.placement.values()
            before, after = (sum(getattr(one, name) for one in layers) / len(layers) for name in BALANCES)
            moved = sum(one.moved for one in layers)
            placed = f", busiest rank over mean {before:.3f} -> {after:.3f} ({moved} experts moved)"
        if self.reason == REARRANGE:
            return f"rearranged at step {self.step}: {placed.removeprefix(', ')}, {self.surgery_seconds:.2f} s"
        saved = 1 - self.parameters_after / self.parameters_before
        return (
            f"pruned at step {self.step} ({self.reason}): experts {self.experts_before} -> {self.experts_after}, "
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} (-{saved:.1%}), re-routed "
            f"{self.rerouted_share:.2%} of tokens{placed}, {self.surgery_seconds:.2f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "replaced"}
        placed = self.placement
        placement = (
            None if placed is None else {str(layer): asdict(placed_layer) for layer, placed_layer in placed.items()}
        )
        return fields | {
            "plan": self.plan.to_json(),
            "placement": placement,
            "loads": {str(layer): list(loads) for layer, loads in self.loads.items()},
            "layers": {
                str(layer): asdict(layer_event) | {"dropped": list(layer_event.dropped)}
                for layer, layer_event in self.layers.items()
            },
            "memory_before": asdict(self.memory_before),
            "memory_after": asdict(self.memory_after),
            "experts_before": self.experts_before,
            "experts_after": self.experts_after,
            "rerouted_share": self.rerouted_share,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneEvent:
        """The inverse of `to_json`.

        Raises:
            SecateurError: something is missing, of another kind or out of range; or plan, layers and loads disagree.
        """
        return _event(data, "event")


class EventFile(msgspec.Struct, frozen=True, kw_only=True):
    """A `PruneEvent` as a file has it. What follows from the rest stands beside these entries and is not read."""

    step: Count
    tokens: Count
    reason: Literal["stable", "step", "tokens", "rearrange"]
    plan: dict[str, Any]
    loads: dict[Layer, list[Count]]
    layers: dict[Layer, LayerEvent]
    parameters_before: Positive
    parameters_after: Positive
    memory_before: Memory
    memory_after: Memory
    alpha: Finite | Literal["inf"] | None
    beta: Finite | Literal["inf"] | None
    surgery_seconds: Finite
    oracle_max_abs_difference: Finite | None
    placement: dict[Layer, LayerPlacement] | None = None


def read_events(path: Path) -> list[tuple[PruneEvent, dict[str, Any]]]:
    """The events of an events.json, in order, each with its record as it was written.

    Raises:
        SecateurError: the file cannot be read or holds something else; the message names it and the event.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise SecateurError(f"{path}: found {records!r:.{SHOWN}}, expected a list of events")
    return [(_event(record, f"{path}, event {number}"), record) for number, record in enumerate(records, start=1)]


def _event(data: Any, where: str) -> PruneEvent:
    file = as_record(data, EventFile, where)
    try:
        plan = Plan.from_json(file.plan)
        check_copies(plan)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error
    said, planned = _counts(file.layers), _counts(plan.layers)
    for layer in sorted(said.keys() | planned.keys()):
        found, expected = said.get(layer), planned.get(layer)
        if found != expected:
            raise SecateurError(
                f"{where}: experts before, after and dropped of layer {layer} are {found!r:.{SHOWN}} in 'layers', "
                f"expected {expected!r:.{SHOWN}} as in 'plan'"
            )
    for layer, layer_plan in plan.layers.items():
        num_loads = len(file.loads.get(layer, ()))
        if num_loads != layer_plan.experts_before:
            raise SecateurError(
                f"{where}: the plan starts from {layer_plan.experts_before} experts in layer {layer}, but there are "
                f"{num_loads} loads"
            )
    if len({one.num_ranks for one in (file.placement or {}).values()}) > 1:
        raise SecateurError(f"{where}: 'placement' is of several numbers of ranks, expected one for all layers")
    off = {name: None for name in ("alpha", "beta") if getattr(file, name) == "inf"}
    return PruneEvent(
        **{**msgspec.structs.asdict(file), **off, "plan": plan, "loads": dict(sorted(file.loads.items()))}
    )


def _counts(layers: Mapping[int, LayerEvent] | Mapping[int, LayerPlan]) -> dict[int, tuple[Any, ...]]:
    return {layer: (one.experts_before, one.experts_after, one.dropped) for layer, one in layers.items()}


def layer_events(plan: Plan, stats: RouterStats) -> dict[int, LayerEvent]:
    """What `plan` does to each layer, with the share of the loads in `stats` that it re-routes."""
    events = {}
    for layer, layer_plan in plan.layers.items():
        loads = stats.layers[layer].token_count
        dropped = list(layer_plan.dropped)
        events[layer] = LayerEvent(
            experts_before=layer_plan.experts_before,
            experts_after=layer_plan.experts_after,
            dropped=tuple(dropped),
            rerouted_share=float(loads[dropped].sum() / loads.sum()),
        )
    return events
