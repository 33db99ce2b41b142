"""Scores that need no data: what the weights of an expert and its router row look like.

`WeightStats` are sums over weights, so that a checkpoint can be read tensor by tensor; the functions below turn those
of one layer into scores, (E,) float64, higher = keep.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from secateur.errors import SecateurError

CHUNK = 2**17  # weights that are converted to float64 at a time: 1 MiB, which stays in the cache of the processor
NO_WEIGHT = -2.0  # below every other score of `aimer`


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightStats:
    """Sums over the weights of each expert of one layer; `+` adds tensors and shards up.

    Args:
        num_weights: (E,) int64, entries of its projection matrices.
        absolute_sum: (E,) float64, sum of |w| over them.
        square_sum: (E,) float64, sum of w^2 over them.
        router_square_sum: (E,) float64, sum of w^2 over its router row.
    """

    num_weights: Tensor
    absolute_sum: Tensor
    square_sum: Tensor
    router_square_sum: Tensor

    @classmethod
    def of_experts(cls, name: str, weights: Tensor, *, first: int = 0, num_experts: int | None = None) -> WeightStats:
        """Of one projection.

        Args:
            name: of the tensor, for messages.
            weights: (e, ...) floating point, experts on the first axis; `weights[None]` where a tensor is one expert's.
            first, num_experts: the tensor holds experts first to first + e - 1 of so many; left out: all of them.

        Raises:
            SecateurError: not floating point, an entry that is not finite, or ids out of range.
        """
        place = _placer(name, weights, first, num_experts)
        sums = [_sums(name, row) for row in weights]
        return cls(
            num_weights=place([row.numel() for row in weights]).to(torch.int64),
            absolute_sum=place([absolute for absolute, _ in sums]),
            square_sum=place([square for _, square in sums]),
            router_square_sum=place([0.0] * len(sums)),
        )

    @classmethod
    def of_router(cls, name: str, weights: Tensor, *, first: int = 0, num_experts: int | None = None) -> WeightStats:
        """Of a router: (e, D), a row for each expert, no bias; otherwise as `of_experts`."""
        place = _placer(name, weights, first, num_experts)
        nothing = place([0.0] * len(weights))
        return cls(
            num_weights=nothing.to(torch.int64),
            absolute_sum=nothing,
            square_sum=nothing,
            router_square_sum=place([_sums(name, row)[1] for row in weights]),
        )

    @property
    def num_experts(self) -> int:
        return self.num_weights.numel()

    def __add__(self, other: WeightStats) -> WeightStats:
        if self.num_experts != other.num_experts:
            raise SecateurError(f"weights of {self.num_experts} and of {other.num_experts} experts do not add up")
        return WeightStats(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


def aimer(weights: WeightStats) -> Tensor:
    """-mean|w| / sqrt(mean w^2) over all projections of an expert together (AIMER, arXiv 2603.18492).

    Negative because the paper prunes high values: -1 where all entries have one magnitude, at most -1 / sqrt(entries).
    Scaling an expert changes nothing. The published code keeps an expert whose weights are all 0; here it goes first,
    with the score NO_WEIGHT.
    """
    count = weights.num_weights.to(torch.float64)
    root_mean_square = (weights.square_sum / count).sqrt()
    ratio = weights.absolute_sum / count / root_mean_square.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(weights.square_sum > 0, -ratio, NO_WEIGHT)


def weight_norm(weights: WeightStats) -> Tensor:
    """L2 norm of all projections of an expert together."""
    return weights.square_sum.sqrt()


def router_row_norm(weights: WeightStats) -> Tensor:
    """L2 norm of an expert's router row: a surrogate, without a reference model, of the score of arXiv 2405.16646."""
    return weights.router_square_sum.sqrt()


def random(num_experts: int, *, seed: int, layer: int) -> Tensor:
    """The control: uniform numbers in [0, 1), the same for a seed and layer on every machine."""
    generator = python_random.Random(f"secateur {seed} {layer}")
    return torch.tensor([generator.random() for _ in range(num_experts)], dtype=torch.float64)


def _placer(name: str, weights: Tensor, first: int, num_experts: int | None) -> Callable[[list[float]], Tensor]:
    """A function from one number for each row of `weights` to (num_experts,) float64, 0 for the other experts."""
    total = first + len(weights) if num_experts is None else num_experts
    if first < 0 or first + len(weights) > total:
        raise SecateurError(f"{name}: holds experts {first} to {first + len(weights) - 1}, expected 0 to {total - 1}")

    def place(numbers: list[float]) -> Tensor:
        placed = torch.zeros(total, dtype=torch.float64)
        placed[first : first + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        return placed

    return place


def _sums(name: str, weights: Tensor) -> tuple[float, float]:
    """Sum of |w| and of w^2, in float64."""
    if not weights.is_floating_point():
        raise SecateurError(f"{name} has type {weights.dtype}, expected floating point; decode quantised weights first")
    absolute = square = 0.0
    # one for all chunks: to get memory takes longer than the sums
    buffer = torch.empty(min(CHUNK, weights.numel()), dtype=torch.float64, device=weights.device)
    for chunk in weights.detach().flatten().split(CHUNK):  # type: ignore[no-untyped-call]
        wide = buffer[: len(chunk)].copy_(chunk)
        square += float(torch.dot(wide, wide))
        absolute += float(wide.abs_().sum())
    if not torch.isfinite(torch.tensor([absolute, square])).all():
        raise SecateurError(f"{name} has entries that are not finite")
    return absolute, square
