"""How sure a mean, and a difference of two means over the same samples, is.

Shapes: N samples, of text a block with its tokens, of images an image that counts 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000
RANGE = (0.025, 0.975)  # quantiles of a 95 % range


def paired(more: Tensor, counts: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Of (N,) differences and what each counts (N,): sum(more) / sum(counts) as "mean", and how sure it is, as JSON.

    "low" and "high" are a 95 % range by RESAMPLES bootstrap samples; null, as the "standard_error", for one sample.
    """
    low = high = None
    if len(more) > 1:
        generator = torch.Generator().manual_seed(seed)
        means = torch.empty(RESAMPLES, dtype=torch.float64)
        for turn in range(RESAMPLES):
            drawn = torch.randint(len(more), (len(more),), generator=generator)
            means[turn] = more[drawn].sum() / counts[drawn].sum()
        low, high = means.quantile(torch.tensor(RANGE, dtype=torch.float64)).tolist()
    return {
        "mean": float(more.sum() / counts.sum()),
        "standard_error": standard_error(more, counts),
        "low": low,
        "high": high,
    }


def standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Of the ratio sum(sums) / sum(counts), as of N samples; of equal counts: deviation / sqrt(N)."""
    number = len(sums)
    if number < 2:
        return None
    rest = sums - sums.sum() / counts.sum() * counts
    return float((rest.square().sum() * number / (number - 1)).sqrt() / counts.sum())
