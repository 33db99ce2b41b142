"""PruneEvent: what one pruning did, as a value that logs, files and the report share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.plan import Plan
from secateur.stats import RouterStats


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes held by parameters and by optimizer state."""

    parameters_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerEvent:
    """One layer of a pruning. rerouted_share: share of its routed tokens whose expert went."""

    experts_before: int
    experts_after: int
    dropped: tuple[int, ...]
    rerouted_share: float


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One pruning of a run.

    step, tokens: optimizer steps and tokens done. reason: stable, step or tokens. loads: {layer: tokens per expert}
    that the decision was made on, in the numbering before it. alpha, beta: thresholds, None where one is off (also
    when given as inf) or a goal was given (the plan's details hold what it comes to). oracle_max_abs_difference:
    largest difference of a logit from the barred-experts oracle on one training sequence, None when the self-check
    was off.
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
        gone = sum(self.loads[layer][old] for layer, one in self.layers.items() for old in one.dropped)
        return gone / total

    def describe(self) -> str:
        """One line for a log."""
        saved = 1 - self.parameters_after / self.parameters_before
        return (
            f"step {self.step} ({self.reason}): experts {self.experts_before} -> {self.experts_after}, parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,} (-{saved:.1%}), re-routed "
            f"{self.rerouted_share:.2%} of tokens, {self.surgery_seconds:.2f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "plan": self.plan.to_json(),
            "loads": {str(layer): list(loads) for layer, loads in self.loads.items()},
            "layers": {str(layer): asdict(one) | {"dropped": list(one.dropped)} for layer, one in self.layers.items()},
            "memory_before": asdict(self.memory_before),
            "memory_after": asdict(self.memory_after),
            "experts_before": self.experts_before,
            "experts_after": self.experts_after,
            "rerouted_share": self.rerouted_share,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneEvent:
        """The inverse of `to_json`."""
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(
            **fields
            | {
                "plan": Plan.from_json(data["plan"]),
                "loads": {int(layer): loads for layer, loads in data["loads"].items()},
                "layers": {
                    int(layer): LayerEvent(**{**one, "dropped": tuple(one["dropped"])})
                    for layer, one in data["layers"].items()
                },
                "memory_before": Memory(**data["memory_before"]),
                "memory_after": Memory(**data["memory_after"]),
            }
        )


def layer_events(plan: Plan, stats: RouterStats) -> dict[int, LayerEvent]:
    """What `plan` does to each layer, with the share of the loads in `stats` that it re-routes."""
    events = {}
    for layer, one in plan.layers.items():
        loads = stats.layers[layer].token_count
        dropped = list(one.dropped)
        events[layer] = LayerEvent(
            experts_before=one.experts_before,
            experts_after=one.experts_after,
            dropped=tuple(dropped),
            rerouted_share=float(loads[dropped].sum() / loads.sum()),
        )
    return events
