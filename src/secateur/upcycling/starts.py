"""How a router begins: functions of one table.

Shapes: L layers, U units (experts whose rows differ), D hidden size, T tokens of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.upcycling.ridge import RidgeSums

WITHIN = 0.01  # of `norm`: how far the weight of an expert is from that of the others at most


@dataclass(frozen=True, kw_only=True)
class LayerSeen:
    """Of one layer on text: sums of its input (and the norms of each expert's output, or the domains, as targets).

    largest: of `norm`, the longest input, which bounds the logits.
    """

    sums: RidgeSums
    largest: float


@dataclass(frozen=True, kw_only=True)
class Start:
    """A row of the table. targets: what `sums` of LayerSeen are of, None where no text is read."""

    help: str
    targets: str | None
    rows: Callable[[int, int, float, int, LayerSeen | None], Tensor]


def random_rows(units: int, hidden: int, std: float, seed: int, seen: LayerSeen | None = None) -> Tensor:
    """(U, D) normal numbers of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, hidden, generator=generator, dtype=torch.float64) * std


def hidden_rows(units: int, hidden: int, std: float, seed: int, seen: LayerSeen | None) -> Tensor:
    """(U, D) the mean input of the layer on each domain's text, at length 1."""
    assert seen is not None
    counts = seen.sums.counts
    if not bool((counts > 0).all()):
        raise SecateurError(f"--router hidden: no token of domain {int((counts == 0).nonzero()[0])}")
    return torch.nn.functional.normalize(seen.sums.yh / counts[:, None], dim=1)


def ridge_rows(units: int, hidden: int, std: float, seed: int, seen: LayerSeen | None) -> Tensor:
    """(U, D) R = (sum y h^T)(sum h h^T + lambda I)^-1, y the one-hot domain (2603.29765, as we read it)."""
    assert seen is not None
    return seen.sums.solve()


def norm_rows(units: int, hidden: int, std: float, seed: int, seen: LayerSeen | None) -> Tensor:
    """(U, D) ridge from the input to the norm of each expert's output, as small as `WITHIN` demands.

    The logits z of a token sum to 0, so the mean of exp(z) is between 1 and cosh(m), where m is the largest |z|, and
    p_e * U between exp(-m) / cosh(m) and exp(m): m = log(1 + WITHIN) is enough. A row's length times the longest input
    bounds |z|.
    """
    assert seen is not None
    rows = seen.sums.solve()
    rows = rows - rows.mean(0)  # what all experts share moves no choice
    longest = float(rows.norm(dim=1).max()) * seen.largest
    return rows * (math.log1p(WITHIN) / longest) if longest else rows


STARTS: Mapping[str, Start] = MappingProxyType(
    {
        "random": Start(help="normal numbers, --router-std", targets=None, rows=random_rows),
        "norm": Start(help="by the norm of an expert's output", targets="norms", rows=norm_rows),
        "hidden": Start(help="by the mean hidden state of a domain", targets="domains", rows=hidden_rows),
        "ridge": Start(help="by regression on the domains (2603.29765)", targets="domains", rows=ridge_rows),
    }
)
