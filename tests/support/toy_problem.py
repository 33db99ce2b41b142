"""Two layers of four experts, small enough to decide by hand what a pruning rule does to them."""

from __future__ import annotations

from collections.abc import Callable

from secateur.decide.by_load import Allocation, Problem
from secateur.decide.limits import LayerLimits

# All experts have 10 parameters, and the rest of the model 20.
TOY = Problem(
    loads={0: (5, 1, 4, 2), 1: (3, 3, 0, 6)},
    limits={layer: LayerLimits(num_experts=4) for layer in (0, 1)},
    params_per_expert={0: 10, 1: 10},
    total_params=100,
)


def of_toy(rule: Callable[..., Allocation], **options: float) -> dict[int, tuple[int, ...]]:
    """{layer: the experts that a rule keeps} of TOY."""
    return rule(TOY, **options).kept
