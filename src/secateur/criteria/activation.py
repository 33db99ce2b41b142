"""Scores from one pass over data: sums of what an expert did on the tokens routed to it.

Each function takes the statistics of one layer and gives its scores, (E,) float64, higher = keep. The sums it reads
are listed in CRITERIA and must be there; `secateur.criteria.score` checks that. An expert that no token
reached scores 0.

Symbols: N tokens routed to an expert, g gate, f the expert's output before the gate, ||f|| its L2 norm; sums run over
the N tokens.

The examples score the toy of `tests/support/toy_layer.py`: three tokens, three experts of width 2, two of them a token.
`of_toy` rounds to six digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.stats import LayerStats


def frequency(stats: LayerStats) -> Tensor:
    """N (hard counts of SEER-MoE, arXiv 2404.05089).

    >>> of_toy(frequency)
    [2.0, 3.0, 1.0]
    """
    return stats.token_count.to(torch.float64)


def soft_frequency(stats: LayerStats) -> Tensor:
    """Sum of g, the gates that the model really multiplied with (soft counts over routed tokens, arXiv 2404.05089).

    Public code also calls the sum of the full softmax over all tokens by this name; it needs the router's logits and
    is another criterion.

    >>> of_toy(soft_frequency)
    [1.444444, 1.111111, 0.444444]
    """
    return _sum(stats, "weight_sum")


def ean(stats: LayerStats) -> Tensor:
    """Expert activation norm: sum of ||f|| (arXiv 2504.05586).

    >>> of_toy(ean)
    [7.0, 6.0, 10.0]
    """
    return _sum(stats, "norm_sum")


def man(stats: LayerStats) -> Tensor:
    """Mean activation norm: sum of ||f|| / N (arXiv 2606.15716, formula inferred from its abstract).

    >>> of_toy(man)
    [3.5, 2.0, 10.0]
    """
    return _mean(stats, "norm_sum")


def msan(stats: LayerStats) -> Tensor:
    """Mean squared activation norm: sum of ||f||^2 / N (arXiv 2606.15716, formula inferred from its abstract).

    >>> of_toy(msan)
    [14.5, 4.666667, 100.0]
    """
    return _mean(stats, "norm_square_sum")


def weighted_ean(stats: LayerStats) -> Tensor:
    """Sum of g ||f||: REAP without the mean (arXiv 2510.13999, published code).

    >>> of_toy(weighted_ean)
    [4.888889, 2.111111, 4.444444]
    """
    return _sum(stats, "weighted_norm_sum")


def reap(stats: LayerStats) -> Tensor:
    """Router-weighted expert activation: sum of g ||f|| / N (arXiv 2510.13999, equation of the saliency score).

    >>> of_toy(reap)
    [2.444444, 0.703704, 4.444444]
    """
    return _mean(stats, "weighted_norm_sum")


def _sum(stats: LayerStats, name: str) -> Tensor:
    return stats.sums[name].clone()


def _mean(stats: LayerStats, name: str) -> Tensor:
    """A sum by the tokens of each expert, along its first axis."""
    value = stats.sums[name]
    return value / stats.token_count.clamp(min=1).view(-1, *[1] * (value.dim() - 1))
