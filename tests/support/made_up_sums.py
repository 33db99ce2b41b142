"""Made-up statistics with every sum of the table, whatever its axes: a new sum needs no line in any test."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.stats import SUMS

SIZES = {"D": 3, "F": 5}


def shape_of(name: str, num_experts: int) -> tuple[int, ...]:
    return tuple((SIZES | {"E": num_experts})[axis] for axis in SUMS[name].axes)


def sums_like(count: Tensor, names: Iterable[str] = SUMS) -> dict[str, Tensor]:
    """Sums of experts of which each token adds 1 to every entry: (E,) sums equal the counts."""
    return {name: _reached(torch.ones(shape_of(name, len(count)), dtype=torch.float64), name, count) for name in names}


def random_sums(count: Tensor, seed: int = 0, names: Iterable[str] = SUMS) -> dict[str, Tensor]:
    """Random sums, 0 where no token came. They are dyadic, so that they add up exactly in every order."""
    rng = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randint(1, 2**20, shape_of(name, len(count)), generator=rng).double() / 2**10 for name in SUMS}
    return {name: _reached(drawn[name], name, (count > 0).long()) for name in names}


def _reached(value: Tensor, name: str, factor: Tensor) -> Tensor:
    for dim, axis in enumerate(SUMS[name].axes):
        if axis == "E":
            value = value * factor.view(-1, *[1] * (value.dim() - dim - 1))
    return value
