"""From statistics and a rule to a plan: thresholds, a parameter goal, or a re-routing goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from secateur.decide.by_load import Problem, to_plan
from secateur.decide.laep_rule import implied_thresholds
from secateur.decide.limits import Limits
from secateur.decide.rules import OPTIONS, RULES, RuleFields, RuleOptions, kind_of, with_options_listed
from secateur.plans import JSON, Plan
from secateur.stats import RouterStats


@with_options_listed
@dataclass(frozen=True, kw_only=True)
class Rule(RuleFields):
    """What decides how many experts go: the options of exactly one rule of the table.

    Args:
        uniform: keep one count for all layers.

    Raises:
        SecateurError: no rule or several, or a value of another type or out of range; the message names the option.
    """

    uniform: bool = False

    if TYPE_CHECKING:

        def __init__(self, *, uniform: bool = False, **rule: Unpack[RuleOptions]) -> None: ...

    def __post_init__(self) -> None:
        kind_of(self.given)
        for name, value in self.given.items():
            OPTIONS[name].check(value)

    @property
    def given(self) -> dict[str, float]:
        """The options that were given."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def kind(self) -> str:
        """Its entry in RULES, such as "thresholds" or "target_params"."""
        return kind_of(self.given).name

    @property
    def values(self) -> dict[str, float]:
        """What its function takes: all options of its kind, one that was left out being off."""
        return RULES[self.kind].values(self.given)

    @property
    def thresholds(self) -> tuple[float, float]:
        """(alpha, beta), a constraint that was left out being off."""
        alpha, beta = RULES["thresholds"].values(self.given).values()
        return alpha, beta

    def to_json(self) -> dict[str, Any]:
        """What was asked for: all options of its kind. inf is a float here, see `Plan.details`."""
        return {**self.values, "uniform": self.uniform}


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
    problem = Problem(
        loads=stats.loads(),
        limits=limits,
        params_per_expert=params_per_expert,
        total_params=total_params,
        uniform=rule.uniform,
    )
    allocation = RULES[rule.kind].function(problem, **rule.values)
    removed, rerouted = allocation.removed, allocation.rerouted
    layers: dict[str, JSON] = {}
    for layer, loads in allocation.loads.items():
        alpha, beta = implied_thresholds(loads, removed[layer])
        layers[str(layer)] = {"rerouted_share": rerouted[layer] / sum(loads), "alpha": alpha, "beta": beta}
    share = sum(rerouted.values()) / sum(sum(loads) for loads in allocation.loads.values())
    details: dict[str, JSON] = {"rule": rule.to_json(), "rerouted_share": share, "layers": layers}
    return to_plan(allocation, criterion="laep", details=details, stats_digest=stats.digest())
