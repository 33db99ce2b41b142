"""How many experts each layer keeps, and which: LAEP's thresholds, or a goal that is solved over all layers at once.

Loads are {layer: tokens of each expert}. Cost is counted in raw token-slots: each token routed to an expert that goes
counts 1, whichever the layer. A layer that saw more tokens therefore weighs more; in one run all layers see the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from secateur.decide.knapsack import Option, cheapest_saving, largest_saving
from secateur.decide.laep_rule import check_loads, laep_removable
from secateur.decide.limits import Limits, Loads, check_share, common_counts, removal_by_group
from secateur.errors import SecateurError
from secateur.plans import JSON, LayerPlan, Plan


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


def laep(loads: Loads, limits: Limits, *, alpha: float, beta: float, uniform: bool = False) -> Allocation:
    """LAEP's thresholds, layer by layer (see `laep_removable`).

    The retained count is rounded up to an admissible one; floor and cap are part of that. With router groups every
    group loses as many experts as the group in which the rule allows fewest.
    With `uniform` all layers keep the smallest common count that is at least what any layer keeps without it, so the
    rule is never violated.

    Raises:
        SecateurError: thresholds out of range, unusable loads, or no common count.
    """
    counts = {}
    for layer in _layers(loads, limits):
        layer_limits = limits[layer]
        in_group = [0] * layer_limits.num_groups
        for expert in laep_removable(loads[layer], alpha=alpha, beta=beta, name=f"layer {layer}"):
            in_group[expert * layer_limits.num_groups // layer_limits.num_experts] += 1
        retained = layer_limits.num_experts - layer_limits.num_groups * min(in_group)
        admissible = layer_limits.counts()
        counts[layer] = next((count for count in admissible if count >= retained), admissible[-1])
    if uniform:
        common, most = common_counts(limits), max(counts.values())
        if common[-1] < most:
            layers = [layer for layer, count in counts.items() if count > common[-1]]
            raise SecateurError(
                f"uniform: the thresholds keep up to {most} experts in layers {layers}, "
                f"but not every layer can keep more than {common[-1]}"
            )
        counts = dict.fromkeys(counts, next(count for count in common if count >= most))
    return _allocation(loads, limits, counts)


def target_params(
    loads: Loads,
    limits: Limits,
    *,
    params_per_expert: Mapping[int, int],
    total_params: int,
    target: float,
    uniform: bool = False,
) -> Allocation:
    """Keep at most `target * total_params` parameters, re-routing the fewest token-slots.

    Ties: the fewest removed parameters, then the lower layer ids keep more. Exact; see `secateur.decide.knapsack` for
    the bound where the expert sizes of the layers have no useful common divisor and the problem is large.

    Args:
        params_per_expert: {layer: parameters that go with one expert, its router row included}.
        total_params: parameters of the whole model, before.
        target: share of them to keep at most, above 0 and below 1.

    Raises:
        SecateurError: floors make the goal impossible; the message has the smallest share that can be reached.
    """
    need = total_params - math.floor(check_share("target_params", target) * total_params)
    options = _options(loads, limits, params_per_expert)
    held = sum(params_per_expert[layer] * limits[layer].num_experts for layer in options)
    if total_params < held:
        raise SecateurError(f"total_params is {total_params}, but the experts alone have {held} parameters")
    if uniform:
        fitting = [(cost, saving, count) for count, saving, cost in _common(options, limits) if saving >= need]
        counts = dict.fromkeys(options, min(fitting)[2]) if fitting else None
    else:
        counts = _pick(options, cheapest_saving(_pairs(options), need))
    if counts is None:
        raise _unreachable(limits, params_per_expert, total_params, target, uniform)
    return _allocation(loads, limits, counts)


def max_rerouted(
    loads: Loads, limits: Limits, *, params_per_expert: Mapping[int, int], share: float, uniform: bool = False
) -> Allocation:
    """Remove as many parameters as possible while at most `share` of all routed token-slots are re-routed.

    Ties: the fewest re-routed, then the lower layer ids keep more. Exactness as for `target_params`.

    Raises:
        SecateurError: the caps alone re-route more than that.
    """
    exact_share = check_share("max_rerouted", share)
    options = _options(loads, limits, params_per_expert)
    total = sum(sum(loads[layer]) for layer in options)
    budget = math.floor(exact_share * total)
    if uniform:
        fitting = [(-saving, cost, count) for count, saving, cost in _common(options, limits) if cost <= budget]
        counts = dict.fromkeys(options, min(fitting)[2]) if fitting else None
    else:
        counts = _pick(options, largest_saving(_pairs(options), budget))
    if counts is None:
        reason = "uniform and max_experts" if uniform else "max_experts"
        raise SecateurError(
            f"max_rerouted is {share}, which is {budget} of {total} routed tokens, but {reason} alone re-route more"
        )
    return _allocation(loads, limits, counts)


def _layers(loads: Loads, limits: Limits) -> list[int]:
    """The layer ids, ascending, after checking that loads and limits are about the same experts."""
    if not loads or loads.keys() != limits.keys():
        raise SecateurError(f"loads are about layers {sorted(loads)}, limits about layers {sorted(limits)}")
    for layer, counts in loads.items():
        if len(counts) != limits[layer].num_experts:
            raise SecateurError(f"layer {layer}: loads of {len(counts)} experts, expected {limits[layer].num_experts}")
        check_loads(counts, f"layer {layer}")
    return sorted(loads)


def _allocation(loads: Loads, limits: Limits, counts: Mapping[int, int]) -> Allocation:
    kept = {}
    for layer, count in counts.items():
        per_group = count // limits[layer].num_groups
        groups = removal_by_group(loads[layer], limits[layer].num_groups)
        kept[layer] = tuple(sorted(expert for group in groups for expert in group[len(group) - per_group :]))
    return Allocation(kept=kept, loads={layer: tuple(loads[layer]) for layer in counts})


def _options(loads: Loads, limits: Limits, params_per_expert: Mapping[int, int]) -> dict[int, dict[int, Option]]:
    """{layer: {retained count: (parameters saved, token-slots re-routed)}}, keeping most first."""
    options = {}
    for layer in _layers(loads, limits):
        size = params_per_expert.get(layer, 0)
        if size < 1:
            raise SecateurError(f"layer {layer}: params_per_expert is {size}, expected 1 or more")
        experts, num_groups = limits[layer].num_experts, limits[layer].num_groups
        rounds = zip(*removal_by_group(loads[layer], num_groups), strict=True)
        costs = [0, *itertools.accumulate(sum(loads[layer][expert] for expert in ids) for ids in rounds)]
        options[layer] = {
            count: ((experts - count) * size, costs[(experts - count) // num_groups])
            for count in reversed(limits[layer].counts())
        }
    return options


def _pairs(options: Mapping[int, Mapping[int, Option]]) -> list[list[Option]]:
    return [list(choices.values()) for choices in options.values()]


def _pick(options: Mapping[int, Mapping[int, Option]], chosen: list[int] | None) -> dict[int, int] | None:
    if chosen is None:
        return None
    return {layer: list(choices)[index] for (layer, choices), index in zip(options.items(), chosen, strict=True)}


def _common(options: Mapping[int, Mapping[int, Option]], limits: Limits) -> list[tuple[int, int, int]]:
    """(retained count, parameters saved, token-slots re-routed) of each count that every layer admits."""
    return [
        (count, sum(o[count][0] for o in options.values()), sum(o[count][1] for o in options.values()))
        for count in common_counts(limits)
    ]


def _unreachable(
    limits: Limits, params_per_expert: Mapping[int, int], total_params: int, target: float, uniform: bool
) -> SecateurError:
    floors = {layer: layer_limits.counts()[0] for layer, layer_limits in limits.items()}
    if uniform:
        floors = dict.fromkeys(floors, common_counts(limits)[0])
    saved = sum((limits[layer].num_experts - floors[layer]) * params_per_expert[layer] for layer in limits)
    share = math.ceil(10_000 * Fraction(total_params - saved, total_params)) / 10_000
    reasons: dict[str, list[int]] = {}
    for layer in sorted(limits):
        reasons.setdefault(f"keep at least {floors[layer]} experts ({limits[layer].describe()})", []).append(layer)
    lines = "; ".join(f"layers {layers} {reason}" for reason, layers in reasons.items())
    return SecateurError(
        f"target_params is {target}, but the smallest share that can be reached is {share}: "
        f"{'with uniform, ' if uniform else ''}{lines}"
    )
