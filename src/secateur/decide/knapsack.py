"""Choose one option in each layer so that the whole saves enough, or costs little: a multiple-choice knapsack.

An option is (saving in parameters, cost in tokens). The solver is a dynamic programme over savings, exact while its
table fits in MAX_CELLS. Otherwise savings are counted in units of U parameters, each rounded down, and for L layers
the result is not more than L * U parameters off (see the functions). At 64 layers L * U is about 0.2 % of what can be
saved.

Symbols: L layers, N units of saving + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError

Option = tuple[int, int]

# 16 MB of int64, and about a second for 64 layers of 128 experts.
MAX_CELLS = 2_000_000
UNREACHABLE = 2**62


def cheapest_saving(layers: Sequence[Sequence[Option]], need: int, max_cells: int = MAX_CELLS) -> list[int] | None:
    """The index of an option in each layer: savings of at least `need` in sum, at the smallest summed cost.

    Ties: the smallest saving, then the earliest option in the first layer, in the second, and so on.
    With rounded savings the need is still met, and the cost is at most the smallest cost of saving `need` + L * U.

    Returns:
        The indices, or None where even the largest savings do not reach `need`.
    """
    if sum(_largest(options) for options in layers) < need:
        return None
    unit = saving_unit(layers, max_cells)
    table = _cheapest_costs(layers, unit)
    needed = max(0, -(-need // unit))
    costs = table[0, needed:]
    if not len(costs) or int(costs.min()) >= UNREACHABLE:
        # Rounding hides the last L * U parameters; only the largest saving everywhere is sure to reach them.
        return [max(range(len(options)), key=lambda index: options[index][0]) for options in layers]
    saved = needed + int((costs == costs.min()).nonzero()[0])
    return _trace(layers, unit, table, saved)


def largest_saving(layers: Sequence[Sequence[Option]], budget: int, max_cells: int = MAX_CELLS) -> list[int] | None:
    """The index of an option in each layer: the largest summed saving whose summed cost is at most `budget`.

    Ties: the smallest cost, then the earliest option in the first layer, in the second, and so on.
    With rounded savings the budget is still kept, and the saving is less than L * U below the largest one.

    Returns:
        The indices, or None where even the cheapest options cost more than `budget`.
    """
    unit = saving_unit(layers, max_cells)
    table = _cheapest_costs(layers, unit)
    within = (table[0] <= min(budget, UNREACHABLE - 1)).nonzero()
    return _trace(layers, unit, table, int(within[-1])) if len(within) else None


def saving_unit(layers: Sequence[Sequence[Option]], max_cells: int = MAX_CELLS) -> int:
    """Parameters in one unit of saving: the greatest common divisor where the table fits, else as many as it takes."""
    exact = math.gcd(*(saving for options in layers for saving, _ in options)) or 1
    total = sum(_largest(options) for options in layers)
    units = max(1, max_cells // (len(layers) + 1) - 1)
    return exact if total <= units * exact else -(-total // units)


def _largest(options: Sequence[Option]) -> int:
    return max(saving for saving, _ in options)


def _cheapest_costs(layers: Sequence[Sequence[Option]], unit: int) -> Tensor:
    """(L + 1, N) int64: entry [l, n] is the smallest cost of saving exactly n units in layers l and after."""
    if sum(max(cost for _, cost in options) for options in layers) >= UNREACHABLE // 2:
        raise SecateurError("loads: the tokens of all layers together do not fit in 61 bits")
    num_units = sum(_largest(options) // unit for options in layers)
    table = torch.full((len(layers) + 1, num_units + 1), UNREACHABLE, dtype=torch.int64)
    table[-1, 0] = 0
    reach = 1  # entries of the row after that can be anything but unreachable
    for layer in reversed(range(len(layers))):
        for saving, cost in layers[layer]:
            target = table[layer, saving // unit : saving // unit + reach]
            torch.minimum(target, table[layer + 1, :reach] + cost, out=target)
        reach += _largest(layers[layer]) // unit
    return table


def _trace(layers: Sequence[Sequence[Option]], unit: int, table: Tensor, saved: int) -> list[int]:
    """Walk the table from the first layer, taking the earliest option that leads to the best cost."""
    chosen = []
    for layer, options in enumerate(layers):
        best = int(table[layer, saved])
        for index, (saving, cost) in enumerate(options):
            rest = saved - saving // unit
            if rest >= 0 and int(table[layer + 1, rest]) + cost == best:
                chosen.append(index)
                saved = rest
                break
    return chosen
