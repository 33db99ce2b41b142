"""From scores and a `Keep` to a plan: how many experts each layer keeps, and which.

A layer is cut in levels: its admissible numbers of experts. Going down a level drops the experts of lowest score, the
same number in each router group; of equal scores the lower id stays; super-experts never go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import Tensor

from secateur.criteria.score import Weights, find_criterion, never_routed, score_layers, zero_weights
from secateur.criteria.super_experts import super_experts
from secateur.criteria.weights import WeightStats
from secateur.decide.keep import Keep
from secateur.decide.knapsack import cheapest_saving
from secateur.decide.laep_rule import check_loads, exact, lowest_threshold
from secateur.decide.levels import (
    Level,
    counts_at,
    fewest,
    kept_experts,
    levels_of,
    rounded_up,
    saved,
    savings_and_costs,
)
from secateur.decide.limits import LayerLimits, Limits
from secateur.decide.model_facts import Sizes
from secateur.errors import SecateurError
from secateur.plans import JSON, LayerPlan, Plan
from secateur.stats import RouterStats

Ids = Mapping[int, Sequence[int]]
PRECISION = 2**40  # the steps in which a share of a layer's scores is counted


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What an allocation decides on; limits already leave room for the protected experts."""

    keep: Keep
    limits: Limits
    scores: Mapping[int, Tensor]
    protected: Ids
    stats: RouterStats | None
    sizes: Sizes | None

    @property
    def num_experts(self) -> dict[int, int]:
        return {layer: layer_limits.num_experts for layer, layer_limits in self.limits.items()}

    @property
    def size_of_expert(self) -> Mapping[int, int]:
        """{layer: what dropping one expert saves}, in bytes where bytes are asked for, else in experts."""
        return self._known_sizes.bytes_per_expert if self.keep.num_bytes is not None else dict.fromkeys(self.limits, 1)

    @property
    def need(self) -> int:
        """How much all layers together must save, in the same unit; of experts, no more than was asked to go."""
        if self.keep.num_bytes is not None:
            return self._known_sizes.total_bytes - self.keep.num_bytes
        total = sum(self.num_experts.values())
        if self.keep.share is not None:
            goes = math.floor((1 - exact(self.keep.share)) * total)
        else:
            goes = total - sum(self.keep.wanted(self.num_experts).values())
        step = math.gcd(
            *(math.lcm(layer_limits.multiple_of, layer_limits.num_groups) for layer_limits in self.limits.values())
        )
        return goes // step * step

    def saved(self, counts: Mapping[int, int]) -> int:
        return saved(self.limits, counts, self.size_of_expert)

    @property
    def _known_sizes(self) -> Sizes:
        if self.sizes is None or self.sizes.bytes_per_expert.keys() != self.limits.keys():
            raise SecateurError("keep: bytes were asked for, but the sizes of the model and its experts are not known")
        return self.sizes


def plan_by_criterion(
    criterion: str,
    keep: Keep,
    limits: Limits,
    *,
    stats: RouterStats | None = None,
    weights: Weights | None = None,
    sizes: Sizes | None = None,
    allocation: str = "uniform",
    seed: int = 0,
    protect: bool | None = None,
) -> Plan:
    """Keep the experts of highest score.

    Args:
        criterion: a name in `secateur.criteria.CRITERIA`.
        limits: {layer: LayerLimits} of the layers to prune; `MoEModel.limits()` gives those of a live model.
        stats: of the same layers, where the criterion, the allocation or the protection needs data.
        weights: {layer: WeightStats}, where the criterion needs weights.
        sizes: where `keep` is a number of bytes.
        allocation: a name in ALLOCATIONS.
        seed: of the criterion "random".
        protect: keep super-experts (see `super_experts`) whatever their score; left out: where the statistics have
            `max_activation`.

    Returns:
        A plan with ascending orders. Its details: "source", "keep", "allocation", "seed" (null unless random),
        "super_experts" (null where they were not looked for: {"protected", "rescued"}, the latter those that the
        criterion would have dropped), "never_routed" and "zero_weights"; all ids by layer.

    Raises:
        SecateurError: something the criterion or allocation needs is missing, is about other layers or cannot be
            scored; or a layer cannot keep so few experts.
    """
    if allocation not in ALLOCATIONS:
        raise SecateurError(f"allocation is {allocation!r}, expected one of {', '.join(ALLOCATIONS)}")
    num_experts = {layer: limits[layer].num_experts for layer in sorted(limits)}
    scores = score_layers(criterion, num_experts, stats=stats, weights=weights, seed=seed)
    if protect is None:
        protect = stats is not None and "max_activation" in stats.sums
    protected = _protected(stats) if protect else {}
    room = {layer: _with_room(limits[layer], protected.get(layer, ())) for layer in num_experts}
    cut = Cut(keep=keep, limits=room, scores=scores, protected=protected, stats=stats, sizes=sizes)
    counts = ALLOCATIONS[allocation](cut)
    layers, rescued = {}, {}
    for layer, count in counts.items():
        values, safe = scores[layer].tolist(), protected.get(layer, ())
        layers[layer] = LayerPlan(
            experts_before=num_experts[layer], order=kept_experts(limits[layer], count, values=values, protected=safe)
        )
        rescued[layer] = sorted(set(safe) - set(kept_experts(limits[layer], count, values=values)))
    details: dict[str, JSON] = {
        "source": find_criterion(criterion).source,
        "keep": keep.to_json(),
        "allocation": allocation,
        "seed": seed if find_criterion(criterion).needs == "nothing" else None,
        "super_experts": {"protected": _json(protected), "rescued": _json(rescued)} if protect else None,
        "never_routed": _json(never_routed(stats)) if stats is not None else None,
        "zero_weights": _json(zero_weights(weights)) if weights is not None and _has_experts(weights) else None,
    }
    digest = None if stats is None else stats.digest()
    return Plan(layers=layers, criterion=criterion, details=details, stats_digest=digest)


def _uniform(cut: Cut) -> dict[int, int]:
    """One share for all layers, and so one number where they have the same number of experts."""
    keep, levels = cut.keep, {layer: layer_limits.counts() for layer, layer_limits in cut.limits.items()}
    if keep.num_bytes is not None:
        need = cut.need
        shares = {Fraction(count, cut.num_experts[layer]) for layer, counts in levels.items() for count in counts}
        for share in sorted(shares, reverse=True):
            counts = rounded_up(
                cut.limits, {layer: math.ceil(share * experts) for layer, experts in cut.num_experts.items()}
            )
            if cut.saved(counts) >= need:
                return counts
        raise _unreachable(cut)
    wanted = keep.wanted(cut.num_experts)
    counts = rounded_up(cut.limits, wanted)
    for layer, count in wanted.items():
        if count < cut.limits[layer].min_experts or (keep.share is None and count not in levels[layer]):
            raise SecateurError(
                f"keep: {count} of {cut.num_experts[layer]} experts in layer {layer}, expected one of "
                f"{levels[layer]} ({cut.limits[layer].describe()}"
                f"{_super_experts(cut.protected.get(layer, ()))})"
            )
    return counts


def _global(cut: Cut) -> dict[int, int]:
    """The counts that drop the smallest sum of scores, each layer's scores counted as shares of their sum."""
    costs = {layer: _shares(f"layer {layer}", values.tolist()) for layer, values in cut.scores.items()}
    levels = _levels(cut, costs, {layer: values.tolist() for layer, values in cut.scores.items()})
    counts = counts_at(levels, cheapest_saving(savings_and_costs(levels), cut.need))
    if counts is None:
        raise _unreachable(cut)
    return counts


def _laep(cut: Cut) -> dict[int, int]:
    """LAEP's cumulative threshold on the loads, the smallest one that is enough; see `lowest_threshold`."""
    if cut.stats is None:
        raise SecateurError("allocation 'laep' needs token_count: statistics of the model on data, found none")
    loads = cut.stats.loads()
    for layer, values in loads.items():
        check_loads(values, f"layer {layer}")
    levels = _levels(cut, {layer: _shares(f"layer {layer}", values) for layer, values in loads.items()}, loads)
    counts = lowest_threshold(levels, cut.need)
    if counts is None:
        raise _unreachable(cut)
    return counts


ALLOCATIONS: dict[str, Callable[[Cut], dict[int, int]]] = {"uniform": _uniform, "global": _global, "laep": _laep}


def _levels(
    cut: Cut, costs: Mapping[int, Sequence[int]], ranking: Mapping[int, Sequence[float]]
) -> dict[int, list[Level]]:
    """{layer: what each admissible count saves, and the summed cost of what it drops}."""
    if cut.keep.layers is not None:
        raise SecateurError("keep: a number for each layer leaves nothing to allocate; use allocation 'uniform'")
    return {
        layer: levels_of(
            layer_limits,
            values=ranking[layer],
            costs=costs[layer],
            size=cut.size_of_expert[layer],
            protected=cut.protected.get(layer, ()),
        )
        for layer, layer_limits in cut.limits.items()
    }


def _shares(name: str, values: Sequence[float]) -> list[int]:
    """Each value as a share of their sum, in steps of 1 / PRECISION."""
    if min(values) < 0:
        raise SecateurError(f"{name}: a score is {min(values)}; scores that can be below 0 have no shares to compare")
    total = sum(map(Fraction, values)) or Fraction(1)
    return [round(Fraction(value) / total * PRECISION) for value in values]


def _protected(stats: RouterStats | None) -> Ids:
    if stats is None:
        raise SecateurError("protect: super-experts are found by max_activation in statistics, found none")
    return super_experts(stats)


def _with_room(limits: LayerLimits, protected: Sequence[int]) -> LayerLimits:
    """The same limits with a floor under which a group would lose a protected expert."""
    size = limits.num_experts // limits.num_groups
    fullest = max(sum(expert // size == group for expert in protected) for group in range(limits.num_groups))
    floor = max(limits.min_experts, fullest * limits.num_groups)
    if limits.max_experts is not None and floor > limits.max_experts:
        raise SecateurError(f"max_experts is {limits.max_experts}, too few to protect super-experts {list(protected)}")
    return replace(limits, min_experts=floor)


def _unreachable(cut: Cut) -> SecateurError:
    unit = "bytes" if cut.keep.num_bytes is not None else "experts"
    floors = fewest(cut.limits)
    most = cut.saved(floors)
    named = {layer: _super_experts(ids) for layer, ids in cut.protected.items()}
    return SecateurError(
        f"keep: {cut.need} {unit} must go, but at most {most} can: the layers keep at least {floors} experts"
        f"{''.join(f'; layer {layer}{text}' for layer, text in named.items())}"
    )


def _has_experts(weights: Weights) -> bool:
    """Whether more than routers was read."""
    return any(
        isinstance(layer_weights, WeightStats) and bool(layer_weights.num_weights.any())
        for layer_weights in weights.values()
    )


def _super_experts(protected: Sequence[int]) -> str:
    return f", super-experts {list(protected)} are protected" if protected else ""


def _json(ids: Ids) -> JSON:
    return {str(layer): list(experts) for layer, experts in ids.items() if experts}
