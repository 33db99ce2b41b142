"""What did the router and the experts of one layer do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.stats.sums import SUMS, Sum

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False, init=False)
class LayerStats:
    """The routing of one layer.

    Each sum is an attribute as well, under its name in SUMS: None where nothing recorded it.

    Args:
        num_tokens: tokens the router saw.
        token_count: (E,) integers, tokens routed to each expert; its sum is top_k times `num_tokens` where no token is
            lost. Kept as an int64 copy on the CPU, so that an accumulator on a device may go on counting.
        sums: by their names in SUMS, float64 of the shapes that the table says, kept as CPU copies in its order.

    Raises:
        SecateurError: a negative or non-integer count, another shape, or no expert; a sum that is not finite, is
            negative where it cannot be, or not 0 for an expert that no token reached.
        TypeError: no such sum.
    """

    num_tokens: int
    token_count: Tensor
    sums: dict[str, Tensor]

    def __init__(self, *, num_tokens: int, token_count: Tensor, **sums: Tensor | None) -> None:
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
            raise SecateurError(f"num_tokens is {num_tokens!r}, expected an integer of 0 or more")
        if unknown := sums.keys() - SUMS.keys():
            raise TypeError(f"LayerStats has no sum {', '.join(sorted(unknown))}; SUMS has {', '.join(SUMS)}")
        count = _checked_count(token_count)
        sizes = {"E": len(count)}
        given = {name: value for name in SUMS if (value := sums.get(name)) is not None}
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "token_count", count)
        checked = {name: _checked_sum(SUMS[name], value, count, sizes) for name, value in given.items()}
        object.__setattr__(self, "sums", checked)

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in SUMS:
            raise AttributeError(f"LayerStats has no attribute {name!r}")
        return self.sums.get(name)

    @property
    def num_experts(self) -> int:
        return self.token_count.numel()

    def __add__(self, other: LayerStats) -> LayerStats:
        if self.num_experts != other.num_experts:
            raise SecateurError(f"statistics of {self.num_experts} and of {other.num_experts} experts do not add up")
        mine, theirs = self.sums, other.sums
        if mine.keys() != theirs.keys():
            only = sorted(mine.keys() ^ theirs.keys())
            raise SecateurError(f"statistics do not add up: {', '.join(only)} are in one of them only")
        for name, value in mine.items():
            if value.shape != theirs[name].shape:
                shapes = f"{tuple(value.shape)} and {tuple(theirs[name].shape)}"
                raise SecateurError(f"statistics do not add up: {name} has the shapes {shapes}")
        return LayerStats(
            num_tokens=self.num_tokens + other.num_tokens,
            token_count=self.token_count + other.token_count,
            **{name: SUMS[name].merge(value, theirs[name]) for name, value in mine.items()},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerStats):
            return NotImplemented
        return (
            self.num_tokens == other.num_tokens
            and torch.equal(self.token_count, other.token_count)
            and self.sums.keys() == other.sums.keys()
            and all(torch.equal(value, other.sums[name]) for name, value in self.sums.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def reordered(self, order: Sequence[int]) -> LayerStats:
        """The same statistics under other expert ids, order[new] = old."""
        index = torch.tensor(order, dtype=torch.int64)
        taken = {name: SUMS[name].reordered(value, index) for name, value in self.sums.items()}
        return LayerStats(num_tokens=self.num_tokens, token_count=self.token_count[index], **taken)

    def to_json(self) -> dict[str, Any]:
        lists = {name: value.tolist() for name, value in self.sums.items()}
        return {"num_tokens": self.num_tokens, "token_count": self.token_count.tolist(), **lists}


def _checked_count(count: Tensor) -> Tensor:
    if not isinstance(count, Tensor) or count.dim() != 1 or not count.numel():
        shape = tuple(count.shape) if isinstance(count, Tensor) else repr(count)
        raise SecateurError(f"token_count is {shape}, expected a tensor of shape (experts,)")
    if count.dtype not in INTEGERS:
        raise SecateurError(f"token_count has type {count.dtype}, expected integers")
    count = count.detach().to("cpu", torch.int64, copy=True)
    if bool((count < 0).any()):
        raise SecateurError(f"token_count of expert {int(count.argmin())} is {int(count.min())}, expected 0 or more")
    return count


def _checked_sum(row: Sum, value: Tensor, count: Tensor, sizes: dict[str, int]) -> Tensor:
    """`value` as a float64 copy on the CPU, when it can be this sum of a layer of these sizes."""
    is_wide = isinstance(value, Tensor) and value.dtype == torch.float64
    found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    row.check_shape(found, tuple(value.shape) if is_wide else (), sizes)
    value = value.detach().to("cpu", copy=True).contiguous()
    wrong = ~value.isfinite() if row.signed else ~(value.isfinite() & (value >= 0))
    if bool(wrong.any()):
        expected = "a finite number" if row.signed else "a finite number of 0 or more"
        raise SecateurError(f"{_first(row, value, wrong)}, expected {expected}")
    unreached = count == 0
    for dim, axis in enumerate(row.axes):
        if axis == "E":
            along = unreached.view(-1, *[1] * (value.dim() - dim - 1))
            if bool((wrong := (value != 0) & along).any()):
                it = "it" if row.axes.count("E") == 1 else f"expert {int(wrong.nonzero()[0, dim])}"
                raise SecateurError(f"{_first(row, value, wrong)}, though no token reached {it}")
    return value


def _first(row: Sum, value: Tensor, wrong: Tensor) -> str:
    """Where the first wrong entry is, and what."""
    place = tuple(wrong.nonzero()[0].tolist())
    names = [f"{'expert' if axis == 'E' else axis} {index}" for axis, index in zip(row.axes, place, strict=True)]
    return f"{row.name} of {', '.join(names)} is {float(value[place])}"
