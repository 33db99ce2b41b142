"""Plan: for each layer, which old expert each new expert is made of. One file format, composition, inversion.

Dropping experts is a shorter `order`, re-placing them a permutation, merging an entry with several weighted sources,
thinning one with fewer neurons; all are the same value.
"""

from secateur.plans.arrays import Matrix, Neurons
from secateur.plans.file import is_side_file
from secateur.plans.layer import LayerPlan, Source
from secateur.plans.plan import (
    CONVEX,
    FREE,
    JSON,
    MAPPED,
    MEAN,
    MIXED,
    REMOVED,
    REPRESENTATIVE,
    REROUTE,
    ROWS,
    SUM,
    WEIGHTS,
    ZERO_SLOT,
    Plan,
    plan_at,
)

__all__ = [
    "CONVEX",
    "FREE",
    "JSON",
    "MAPPED",
    "MEAN",
    "MIXED",
    "REMOVED",
    "REPRESENTATIVE",
    "REROUTE",
    "ROWS",
    "SUM",
    "WEIGHTS",
    "ZERO_SLOT",
    "LayerPlan",
    "Matrix",
    "Neurons",
    "Plan",
    "Source",
    "is_side_file",
    "plan_at",
]
