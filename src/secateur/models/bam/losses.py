"""The losses of BAM's routers: load balance and z-loss of each MoE layer (arXiv 2408.08274 section 4).

    loss = NLL + sum over layers of (alpha * L_LB + beta * L_z)

They are those of Switch Transformer (arXiv 2101.03961, eq. 4-6) and ST-MoE (arXiv 2202.08906, eq. 5). The paper prints
neither alpha nor beta; 0.01 and 0.001 are our reading. The soft attention router has none; where `attention_top_k`
makes it choose, it has the same ones as the FFN router (our reading).

Legend: T tokens, N experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def load_balance_loss(logits: Tensor, top_k: int, keep: Tensor | None = None) -> Tensor:
    """L_LB = N * sum_i f_i P_i: 1 where routing is even, N where one expert gets all with probability 1.

    f_i is the share of the K choices of all tokens that fall on expert i, without gradient; P_i the mean of its
    probability over tokens.

    Args:
        logits: (T, N) of the router. keep: (T,) 0 for padding, which has no part in it.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = wide.softmax(dim=-1)
    weight = _weights(wide, keep)
    # made of numbers of experts, so that no gradient goes through it
    chosen = torch.zeros_like(wide).scatter(-1, wide.topk(top_k, dim=-1).indices, 1.0 / top_k)
    share = weight @ chosen
    return logits.shape[-1] * (share * (weight @ probabilities)).sum()


def z_loss(logits: Tensor, keep: Tensor | None = None) -> Tensor:
    """L_z = mean over tokens of logsumexp(logits)^2; arguments as of `load_balance_loss`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _weights(wide, keep) @ wide.logsumexp(dim=-1).square()


def router_losses(choices: Iterable[tuple[Tensor, int]], keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum of L_LB, sum of L_z) of several routers.

    Args:
        choices: (logits (T, N), K) of each; numbers of experts may differ. keep: (T,) 0 for padding.
    """
    parts = [(load_balance_loss(logits, top_k, keep), z_loss(logits, keep)) for logits, top_k in choices]
    balance, size = zip(*parts, strict=True)
    return torch.stack([one.to(balance[0].device) for one in balance]).sum(), torch.stack(
        [one.to(balance[0].device) for one in size]
    ).sum()


def target_share(labels: Tensor, shift_labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """The share of this batch in the targets of a whole step.

    Where transformers' Trainer accumulates gradients, it divides the sum of the cross entropies by the targets of the
    step. Weighted by this share, the router losses of its batches add up to their mean.

    Args:
        labels: (B, S), -100 where there is no target; the first of a row is none. shift_labels: already moved by one.
        num_items: targets of the step; None where this batch is all of it.
    """
    if num_items is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum() / torch.as_tensor(num_items, device=targets.device)


def _weights(logits: Tensor, keep: Tensor | None) -> Tensor:
    """(T,) 1 / number of real tokens for each of these, 0 for padding."""
    if keep is None:
        return logits.new_full((len(logits),), 1 / max(1, len(logits)))
    real = keep.reshape(-1).to(logits.dtype).to(logits.device)
    return real / real.sum().clamp_min(1)
