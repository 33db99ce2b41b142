"""A schedule of prunings: what to drop, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from secateur.decide.by_load import Problem, target_params
from secateur.decide.limits import Limits
from secateur.decide.rule import Rule
from secateur.decide.rules import DEFAULT_RULE, RuleOptions, check_names, given, spelled_out
from secateur.errors import SecateurError


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """One pruning of a schedule: what to drop, and when.

    rule: thresholds or a goal. at_step, at_tokens: a fixed time, in optimizer steps or in tokens seen; with neither,
    the first time the loads are stable (counted anew after the pruning before it). at_tokens is looked at when a
    statistics window ends. multiple_of: every kept count is a multiple of it, e.g. the expert-parallel size.
    """

    rule: Rule
    at_step: int | None = None
    at_tokens: int | None = None
    multiple_of: int = 1
    min_experts: int = 1
    max_experts: int | None = None

    def __post_init__(self) -> None:
        if self.at_step is not None and self.at_tokens is not None:
            raise SecateurError("a pruning takes at_step or at_tokens, not both")
        for name in ("at_step", "at_tokens", "multiple_of", "min_experts", "max_experts"):
            if getattr(self, name) is not None or name in ("multiple_of", "min_experts"):
                check_count(name, getattr(self, name))

    @property
    def waits_for_stable(self) -> bool:
        """Whether it comes at the stable phase, at no fixed time."""
        return self.at_step is None and self.at_tokens is None

    @property
    def when(self) -> str:
        """The time in words."""
        if self.at_step is not None:
            return f"step {self.at_step}"
        return "the stable phase" if self.at_tokens is None else f"{self.at_tokens} tokens"


@spelled_out
def as_prunings(
    prunings: Iterable[Pruning] | None,
    *,
    at_step: int | None = None,
    at_tokens: int | None = None,
    multiple_of: int = 1,
    min_experts: int = 1,
    max_experts: int | None = None,
    uniform: bool = False,
    **rule: Unpack[RuleOptions],
) -> tuple[Pruning, ...]:
    """A schedule from either form; see `LAEP`.

    Raises:
        SecateurError: both forms at once, or fixed times that do not increase.
        TypeError: an option that no rule has.
    """
    check_names(rule)
    when: dict[str, Any] = {"at_step": at_step, "at_tokens": at_tokens}
    limits: dict[str, Any] = {"multiple_of": multiple_of, "min_experts": min_experts, "max_experts": max_experts}
    if prunings is None:
        return (Pruning(rule=Rule(uniform=uniform, **given(rule) or DEFAULT_RULE), **when, **limits),)
    found = [name for name, value in {**rule, "uniform": uniform, **when}.items() if value not in (None, False)]
    found += [name for name, value in limits.items() if value not in (None, 1)]
    if found:
        raise SecateurError(f"give a schedule (prunings) or the fields of one pruning, not both: found {found}")
    schedule = tuple(prunings)
    for pruning in schedule:
        if not isinstance(pruning, Pruning):
            raise SecateurError(f"prunings: found {pruning!r:.100}, expected Pruning values")
    for name in ("at_step", "at_tokens"):
        times = [getattr(pruning, name) for pruning in schedule if getattr(pruning, name) is not None]
        if times != sorted(set(times)):
            raise SecateurError(f"the prunings' {name} must increase, found {times}")
    return schedule


def check_goal(
    prunings: Sequence[Pruning],
    limits: Limits,
    *,
    counts: Mapping[int, int],
    params_per_expert: Mapping[int, int],
    total_params: int,
) -> None:
    """Refuse a `target_params` of the last of `prunings` that no loads could meet.

    Each goal is a share of what the one before left, so goals multiply.

    Args:
        prunings: one or more, all still to come. limits: the admissible counts of the last one.
        counts, params_per_expert, total_params: of the model before the first of them; see `decide.rule.decide`.

    Raises:
        SecateurError: floors make it impossible; the message has the smallest share that can be reached.
    """
    rule = prunings[-1].rule
    if rule.target_params is None:
        return
    problem = Problem(
        loads={layer: [1] * count for layer, count in counts.items()},
        limits=limits,
        params_per_expert=params_per_expert,
        total_params=total_params,
        uniform=rule.uniform,
    )
    target_params(problem, target_params=math.prod(pruning.rule.target_params or 1.0 for pruning in prunings))


def check_count(name: str, value: object) -> None:
    """Raise SecateurError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SecateurError(f"{name} is {value!r}, expected a whole number of at least 1")
