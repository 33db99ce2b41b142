"""The losses that keep the experts of V-MoE in use: arXiv 2106.05974 appendix A, after arXiv 1701.06538 section 4.

Legend: T tokens, N experts, P pools of tokens that are routed apart (see `routing`). Each pool has a loss of its own,
and the result is their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = 1e-6  # tokens an expert


def importance_loss(probabilities: Tensor, pool: Tensor, num_pools: int) -> Tensor:
    """How unevenly the experts are weighed: mean over pools of `(std / mean)^2` of the sums over tokens.

    Args:
        probabilities: (T, N) softmax of the router without noise. pool: (T,) number of each token's pool.
    """
    return _squared_variation(_sums(probabilities, pool, num_pools))


def load_loss(
    logits: Tensor, noisy: Tensor, top_k: int, noise_std: float, pool: Tensor, num_pools: int, num_experts: int
) -> Tensor:
    """How unevenly the experts are chosen, made smooth: the same of the probability that each is among a token's K.

    The probability is that a fresh noise would lift the expert's logit to the token's K-th largest noisy one:
    `1 - Phi((threshold - logit) / noise_std)`.

    Args:
        logits, noisy: (T, N) router logits without and with noise. noise_std: of the noise, above 0. num_experts: only
            the first so many of the N have a part in the loss.
    """
    threshold = noisy.topk(top_k, dim=-1).values[:, -1:]
    chosen = torch.special.ndtr((logits - threshold) / noise_std)
    return _squared_variation(_sums(chosen[:, :num_experts], pool, num_pools))


def _sums(values: Tensor, pool: Tensor, num_pools: int) -> Tensor:
    return values.new_zeros(num_pools, values.shape[-1]).index_add(0, pool, values)


def _squared_variation(sums: Tensor) -> Tensor:
    """Mean over the rows of (P, N) of variance / mean^2; it does not change when a row is multiplied by a number.

    A row of next to nothing counts 0: no token is near the experts of its pool, because all prefer removed ones.
    """
    sums = torch.where(sums.mean(dim=-1, keepdim=True) > NOTHING, sums, 1.0)
    return (sums.var(dim=-1, correction=0) / sums.mean(dim=-1).square()).mean()
