"""From statistics and a rule to a plan: thresholds, a parameter goal, or a re-routing goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.decide.by_load import Allocation, laep, max_rerouted, target_params, to_plan
from secateur.decide.laep_rule import implied_thresholds
from secateur.decide.limits import Limits, Loads, check_share
from secateur.errors import SecateurError
from secateur.plans import JSON, Plan
from secateur.stats import RouterStats


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What decides how many experts go: exactly one of thresholds (alpha, beta or both), target_params, max_rerouted.

    Args:
        alpha: an expert goes only if its load is at most alpha times the mean load; more than 0. Left out: inf (off).
        beta: the least used experts go only while together they have less than this share of the load; more than 0,
            at most 1. Left out: 1 (off).
        target_params: keep at most this share of the model's parameters, re-routing the fewest tokens.
        max_rerouted: remove the most parameters while at most this share of the routed tokens loses its expert.
        uniform: keep one count for all layers.

    Raises:
        SecateurError: no choice or several, or a value out of range; the message names the option.
    """

    alpha: float | None = None
    beta: float | None = None
    target_params: float | None = None
    max_rerouted: float | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        if len(self._kinds()) != 1:
            given = [_option(name) for name in ("alpha", "beta", "target_params", "max_rerouted") if self._has(name)]
            raise SecateurError(
                f"pruning rule: found {' with '.join(given) or 'no option'}, expected exactly one of: thresholds "
                f"({_option('alpha')}, {_option('beta')} or both), {_option('target_params')}, "
                f"{_option('max_rerouted')}"
            )
        _check_threshold("alpha", self.alpha, math.inf, "a number above 0, or inf")
        _check_threshold("beta", self.beta, 1, "a number above 0 and at most 1")
        for name in ("target_params", "max_rerouted"):
            if self._has(name):
                check_share(_option(name), getattr(self, name))

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _kinds(self) -> list[str]:
        kinds = ["thresholds"] if self._has("alpha") or self._has("beta") else []
        return kinds + [name for name in ("target_params", "max_rerouted") if self._has(name)]

    @property
    def kind(self) -> str:
        """Its entry in RULES: "thresholds", "target_params" or "max_rerouted"."""
        return self._kinds()[0]

    @property
    def thresholds(self) -> tuple[float, float]:
        """(alpha, beta), a constraint that was left out being off."""
        return math.inf if self.alpha is None else self.alpha, 1.0 if self.beta is None else self.beta

    def to_json(self) -> dict[str, Any]:
        """What was asked for; both thresholds, or the goal. inf is a float here, see `Plan.details`."""
        values = dict(zip(("alpha", "beta"), self.thresholds, strict=True))
        chosen = values if self.kind == "thresholds" else {self.kind: getattr(self, self.kind)}
        return {**chosen, "uniform": self.uniform}


def _laep(loads: Loads, limits: Limits, rule: Rule, params: Mapping[int, int], total: int) -> Allocation:
    alpha, beta = rule.thresholds
    return laep(loads, limits, alpha=alpha, beta=beta, uniform=rule.uniform)


def _target_params(loads: Loads, limits: Limits, rule: Rule, params: Mapping[int, int], total: int) -> Allocation:
    assert rule.target_params is not None
    return target_params(
        loads,
        limits,
        params_per_expert=params,
        total_params=total,
        target=rule.target_params,
        uniform=rule.uniform,
    )


def _max_rerouted(loads: Loads, limits: Limits, rule: Rule, params: Mapping[int, int], total: int) -> Allocation:
    assert rule.max_rerouted is not None
    return max_rerouted(loads, limits, params_per_expert=params, share=rule.max_rerouted, uniform=rule.uniform)


RULES: dict[str, Callable[[Loads, Limits, Rule, Mapping[int, int], int], Allocation]] = {
    "thresholds": _laep,
    "target_params": _target_params,
    "max_rerouted": _max_rerouted,
}


def decide(
    stats: RouterStats, limits: Limits, rule: Rule, *, params_per_expert: Mapping[int, int], total_params: int
) -> Plan:
    """The plan that `rule` makes of the statistics.

    Args:
        stats: the window that decides.
        limits: {layer: LayerLimits} for the layers of `stats`.
        params_per_expert: {layer: parameters that go with one expert, its router row included}.
        total_params: parameters of the whole model, before.

    Returns:
        A plan with ascending orders. Its details: "rule"; "rerouted_share", of the routed token-slots of all layers;
        and for each of "layers" its own "rerouted_share" with the smallest "alpha" and "beta" whose thresholds allow
        the removal (0 where nothing goes).

    Raises:
        SecateurError: the rule cannot be met, or the arguments are not about the same layers.
    """
    allocation = RULES[rule.kind](stats.loads(), limits, rule, params_per_expert, total_params)
    removed, rerouted = allocation.removed, allocation.rerouted
    layers: dict[str, JSON] = {}
    for layer, loads in allocation.loads.items():
        alpha, beta = implied_thresholds(loads, removed[layer])
        layers[str(layer)] = {"rerouted_share": rerouted[layer] / sum(loads), "alpha": alpha, "beta": beta}
    share = sum(rerouted.values()) / sum(sum(loads) for loads in allocation.loads.values())
    details: dict[str, JSON] = {"rule": rule.to_json(), "rerouted_share": share, "layers": layers}
    return to_plan(allocation, criterion="laep", details=details, stats_digest=stats.digest())


def _option(name: str) -> str:
    return f"{name} (--{name.replace('_', '-')})"


def _check_threshold(name: str, value: object, largest: float, expected: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= largest:
        raise SecateurError(f"{_option(name)} is {value!r}, expected {expected}")
