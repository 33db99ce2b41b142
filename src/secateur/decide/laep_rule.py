"""The LAEP rule (arXiv 2601.14327): which experts of one layer are used so little that they may go.

Symbols: n_i tokens routed to expert i, S their sum, E experts, c(i) the running sum of loads in ascending order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from secateur.errors import SecateurError


def exact(value: float) -> Fraction:
    """The decimal number that a float was typed as: 0.1 is 1/10, not the binary number nearest to it."""
    return Fraction(str(value))


def check_loads(loads: Sequence[int], name: str) -> None:
    """Raises SecateurError, naming the layer, when a load is negative or no token was routed."""
    if any(load < 0 for load in loads):
        raise SecateurError(f"{name}: a load is {min(loads)}, expected tokens, 0 or more")
    if not sum(loads):
        raise SecateurError(f"{name}: no token was routed to any of its {len(loads)} experts")


def check_thresholds(alpha: float, beta: float, name: str) -> None:
    """Raises SecateurError unless alpha > 0 (inf included) and 0 < beta <= 1."""
    if not alpha > 0:
        raise SecateurError(f"{name}: alpha is {alpha}, expected more than 0, or inf")
    if not 0 < beta <= 1:
        raise SecateurError(f"{name}: beta is {beta}, expected more than 0 and at most 1")


def removal_order(values: Sequence[float]) -> list[int]:
    """All expert ids in the order they would go: ascending load or score; of equal ones the higher id goes first."""
    return sorted(range(len(values)), key=lambda expert: (values[expert], -expert))


def laep_removable(loads: Sequence[int], *, alpha: float, beta: float, name: str = "layer") -> list[int]:
    """Expert ids that both constraints of LAEP allow to go, in removal order.

    An expert may go when n_i <= alpha * S / E and c(i) < beta * S. Both hold for a prefix of the ascending order.
    alpha = inf or beta = 1 switch a constraint off; with both off every id is returned, and the caller's floors decide.
    Thresholds count as the decimal numbers they were typed as, and the comparison is exact.

    Args:
        loads: (E,) tokens of each expert.
        name: how messages call the layer, such as "layer 3".

    Raises:
        SecateurError: a threshold out of range, a negative load, or a layer that no token was routed to.
    """
    check_thresholds(alpha, beta, name)
    check_loads(loads, name)
    total = sum(loads)
    largest_load = math.inf if alpha == math.inf else exact(alpha) * total / len(loads)
    cumulative_limit = math.inf if beta == 1 else exact(beta) * total
    removable, cumulative = [], 0
    for expert in removal_order(loads):
        cumulative += loads[expert]
        if loads[expert] > largest_load or cumulative >= cumulative_limit:
            break
        removable.append(expert)
    return removable


def implied_thresholds(loads: Sequence[int], removed: Collection[int]) -> tuple[float, float]:
    """The smallest (alpha, beta), as floats, whose rule allows every expert of `removed` to go; (0, 0) for none.

    beta is the next float above c / S, because that constraint is strict, and 1 (off) at most.
    """
    if not removed:
        return 0.0, 0.0
    total = sum(loads)
    order = removal_order(loads)
    last = max(order.index(expert) for expert in removed)
    smallest_alpha = Fraction(loads[order[last]] * len(loads), total)
    cumulative = Fraction(sum(loads[expert] for expert in order[: last + 1]), total)
    alpha, beta = float(smallest_alpha), float(cumulative)
    while alpha == 0 or exact(alpha) < smallest_alpha:
        alpha = math.nextafter(alpha, math.inf)
    while exact(beta) <= cumulative:
        beta = math.nextafter(beta, math.inf)
    return alpha, min(beta, 1.0)


def lowest_threshold(levels: Mapping[int, Sequence[tuple[int, int, int]]], need: int) -> dict[int, int] | None:
    """The experts that each layer keeps at the smallest cumulative threshold that saves enough; None if none does.

    Each layer may drop its least used experts while together they carry less than a share of its load; that share is
    raised, the same for all layers, until enough is saved. Where a step of the share is more than enough, the lower
    layers keep more.

    Args:
        levels: {layer: (experts kept, saving, share of the layer's load that is dropped), keeping most first}.
    """
    counts = {layer: of_layer[0][0] for layer, of_layer in levels.items()}
    saving = {layer: of_layer[0][1] for layer, of_layer in levels.items()}
    steps = [(cost, -layer, -count, saves) for layer, of_layer in levels.items() for count, saves, cost in of_layer[1:]]
    for _, layer, count, saves in sorted(steps):
        if sum(saving.values()) >= need:
            break
        counts[-layer], saving[-layer] = -count, saves
    return counts if sum(saving.values()) >= need else None
