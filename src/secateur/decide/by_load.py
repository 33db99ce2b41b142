"""How many experts each layer keeps, and which: LAEP's thresholds, or a goal that is solved over all layers at once.

Loads are {layer: tokens of each expert}. Cost is counted in raw token-slots: each token routed to an expert that goes
counts 1, whichever the layer. A layer that saw more tokens therefore weighs more; in one run all layers see the same.

The examples decide on the toy of `tests/support/toy_problem.py`: {layer: the experts that stay}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from secateur.decide.knapsack import cheapest_saving, largest_saving
from secateur.decide.laep_rule import check_loads, laep_removable
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
from secateur.decide.limits import Limits, Loads, check_share, common_counts
from secateur.errors import SecateurError
from secateur.plans import JSON, LayerPlan, Plan


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a rule decides on, the same for all rules.

    Args:
        loads: {layer: (E,) tokens of each expert}. limits: of the same layers.
        params_per_expert: {layer: parameters that go with one expert, its router row included}.
        total_params: parameters of the whole model, before.
        uniform: keep one count for all layers.

    Raises:
        SecateurError: loads and limits are not about the same experts, a load is negative, or a layer has no token.
    """

    loads: Loads
    limits: Limits
    params_per_expert: Mapping[int, int] = field(default_factory=dict)
    total_params: int = 0
    uniform: bool = False

    def __post_init__(self) -> None:
        if not self.loads or self.loads.keys() != self.limits.keys():
            raise SecateurError(
                f"loads are about layers {sorted(self.loads)}, limits about layers {sorted(self.limits)}"
            )
        for layer, counts in self.loads.items():
            if len(counts) != self.limits[layer].num_experts:
                raise SecateurError(
                    f"layer {layer}: loads of {len(counts)} experts, expected {self.limits[layer].num_experts}"
                )
            check_loads(counts, f"layer {layer}")

    @property
    def layers(self) -> list[int]:
        return sorted(self.loads)

    def keep(self, counts: Mapping[int, int], *, keeps: str = "the rule keeps") -> Allocation:
        """Keep the most used experts: in each layer the smallest admissible number that is at least the one of
        `counts`, or the largest; with `uniform` the smallest that all layers admit and no layer exceeds.

        Args:
            keeps: how the message says who asks for so many.

        Raises:
            SecateurError: uniform, and not every layer can keep as many as one of them.
        """
        counts = rounded_up(self.limits, counts)
        if self.uniform:
            common, most = common_counts(self.limits), max(counts.values())
            if common[-1] < most:
                layers = [layer for layer in self.layers if counts[layer] > common[-1]]
                raise SecateurError(
                    f"uniform: {keeps} up to {most} experts in layers {layers}, "
                    f"but not every layer can keep more than {common[-1]}"
                )
            counts = dict.fromkeys(counts, next(count for count in common if count >= most))
        return Allocation(
            kept={
                layer: kept_experts(self.limits[layer], counts[layer], values=self.loads[layer])
                for layer in self.layers
            },
            loads={layer: tuple(self.loads[layer]) for layer in self.layers},
        )

    def levels(self) -> dict[int, list[Level]]:
        """What each admissible count saves in parameters and costs in token-slots, of each layer."""
        levels = {}
        for layer in self.layers:
            size = self.params_per_expert.get(layer, 0)
            if size < 1:
                raise SecateurError(f"layer {layer}: params_per_expert is {size}, expected 1 or more")
            loads = self.loads[layer]
            levels[layer] = levels_of(self.limits[layer], values=loads, costs=loads, size=size)
        return levels

    def common_levels(self) -> list[Level]:
        """What each count that all layers admit saves and costs in all of them."""
        by_count = [{level.kept: level for level in of_layer} for of_layer in self.levels().values()]
        return [
            Level(count, sum(one[count].saving for one in by_count), sum(one[count].cost for one in by_count))
            for count in common_counts(self.limits)
        ]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What each layer keeps: old ids ascending, by layer; and the loads that this was decided on."""

    kept: dict[int, tuple[int, ...]]
    loads: dict[int, tuple[int, ...]]

    @property
    def removed(self) -> dict[int, tuple[int, ...]]:
        return {
            layer: tuple(sorted(set(range(len(loads))) - set(self.kept[layer]))) for layer, loads in self.loads.items()
        }

    @property
    def rerouted(self) -> dict[int, int]:
        """Token-slots of each layer whose expert goes."""
        return {layer: sum(self.loads[layer][expert] for expert in ids) for layer, ids in self.removed.items()}


def to_plan(
    allocation: Allocation, *, criterion: str, details: dict[str, JSON], stats_digest: str | None = None
) -> Plan:
    """The plan that keeps what the allocation keeps, in ascending order."""
    layers = {
        layer: LayerPlan(experts_before=len(allocation.loads[layer]), order=kept)
        for layer, kept in allocation.kept.items()
    }
    return Plan(layers=layers, criterion=criterion, details=details, stats_digest=stats_digest)


def laep(problem: Problem, *, alpha: float, beta: float) -> Allocation:
    """LAEP's thresholds, layer by layer (see `laep_removable`).

    The retained count is rounded up to an admissible one; floor and cap are part of that. With router groups every
    group loses as many experts as the group in which the rule allows fewest. Uniform counts never violate the rule.

    >>> of_toy(laep, alpha=0.5, beta=0.3)
    {0: (0, 2, 3), 1: (0, 1, 3)}

    Raises:
        SecateurError: thresholds out of range, or no common count.
    """
    counts = {}
    for layer in problem.layers:
        limits = problem.limits[layer]
        in_group = [0] * limits.num_groups
        for expert in laep_removable(problem.loads[layer], alpha=alpha, beta=beta, name=f"layer {layer}"):
            in_group[expert * limits.num_groups // limits.num_experts] += 1
        counts[layer] = limits.num_experts - limits.num_groups * min(in_group)
    return problem.keep(counts, keeps="the thresholds keep")


def target_params(problem: Problem, *, target_params: float) -> Allocation:
    """Keep at most this share of `total_params`, re-routing the fewest token-slots.

    Ties: the fewest removed parameters, then the lower layer ids keep more. Exact; see `secateur.decide.knapsack` for
    the bound where the expert sizes of the layers have no useful common divisor and the problem is large.

    >>> of_toy(target_params, target_params=0.7)
    {0: (0, 2), 1: (0, 1, 3)}

    Args:
        target_params: above 0 and below 1.

    Raises:
        SecateurError: floors make the goal impossible; the message has the smallest share that can be reached.
    """
    need = problem.total_params - math.floor(check_share("target_params", target_params) * problem.total_params)
    levels = problem.levels()
    held = sum(problem.params_per_expert[layer] * problem.limits[layer].num_experts for layer in levels)
    if problem.total_params < held:
        raise SecateurError(f"total_params is {problem.total_params}, but the experts alone have {held} parameters")
    if problem.uniform:
        fitting = [level for level in problem.common_levels() if level.saving >= need]
        best = min(fitting, key=lambda level: (level.cost, level.saving, level.kept), default=None)
        counts = None if best is None else dict.fromkeys(levels, best.kept)
    else:
        counts = counts_at(levels, cheapest_saving(savings_and_costs(levels), need))
    if counts is None:
        raise _unreachable(problem, target_params)
    return problem.keep(counts)


def max_rerouted(problem: Problem, *, max_rerouted: float) -> Allocation:
    """Remove as many parameters as possible while at most this share of all routed token-slots is re-routed.

    Ties: the fewest re-routed, then the lower layer ids keep more. Exactness as for `target_params`.

    >>> of_toy(max_rerouted, max_rerouted=0.1)
    {0: (0, 2, 3), 1: (0, 1, 3)}

    Args:
        max_rerouted: above 0 and below 1.

    Raises:
        SecateurError: the caps alone re-route more than that.
    """
    exact_share = check_share("max_rerouted", max_rerouted)
    levels = problem.levels()
    total = sum(sum(problem.loads[layer]) for layer in levels)
    budget = math.floor(exact_share * total)
    if problem.uniform:
        fitting = [level for level in problem.common_levels() if level.cost <= budget]
        best = min(fitting, key=lambda level: (-level.saving, level.cost, level.kept), default=None)
        counts = None if best is None else dict.fromkeys(levels, best.kept)
    else:
        counts = counts_at(levels, largest_saving(savings_and_costs(levels), budget))
    if counts is None:
        reason = "uniform and max_experts" if problem.uniform else "max_experts"
        raise SecateurError(
            f"max_rerouted is {max_rerouted}, which is {budget} of {total} routed tokens, but {reason} alone re-route "
            "more"
        )
    return problem.keep(counts)


def _unreachable(problem: Problem, target: float) -> SecateurError:
    limits, total = problem.limits, problem.total_params
    floors = dict.fromkeys(limits, common_counts(limits)[0]) if problem.uniform else fewest(limits)
    left = Fraction(total - saved(limits, floors, problem.params_per_expert), total)
    reasons: dict[str, list[int]] = {}
    for layer in problem.layers:
        reasons.setdefault(f"keep at least {floors[layer]} experts ({limits[layer].describe()})", []).append(layer)
    lines = "; ".join(f"layers {layers} {reason}" for reason, layers in reasons.items())
    share = math.ceil(10_000 * left) / 10_000
    return SecateurError(
        f"target_params is {target}, but the smallest share that can be reached is {share}: "
        f"{'with uniform, ' if problem.uniform else ''}{lines}"
    )
