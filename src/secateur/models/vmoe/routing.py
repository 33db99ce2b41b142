"""Which token goes to which expert, with which weight: the routers of V-MoE as functions of logits.

Tokens are routed in pools that know nothing of each other: the images of one group, and in an ensemble those of one
member. An expert has a number of places in each pool; a token that finds none gets nothing from that expert.

Legend: T tokens, N slots (one an expert) a token may choose among, K top-k, P pools, S token-expert pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a router decides; see VMoEConfig for what the fields mean."""

    expert_choice: bool = False
    top_k: int = 1
    renormalise: bool = False
    over_tokens: bool = False
    priority: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Who meets whom, ascending by token: token (S,), expert (S,), and the weight of the expert's output (S,)."""

    token: Tensor
    expert: Tensor
    gate: Tensor


def capacity(num_tokens: int, num_slots: int, top_k: int, factor: float) -> int:
    """Places of an expert in a pool: `round(K * tokens * C / experts)`, arXiv 2106.05974 section 2.3.

    Halves go up, and there is at least one place.
    """
    return max(1, math.floor(top_k * num_tokens * factor / num_slots + 0.5))


def route(logits: Tensor, rules: Rules, *, pool: Tensor, places: Tensor | None = None) -> Pairs:
    """The pairs that a router makes.

    Args:
        logits: (T, N). pool: (T,) number of each token's pool. places: (P,) places of every expert in each pool; None
            for no limit.
    """
    choose = _experts_choose if rules.expert_choice else _tokens_choose
    slot, gate, kept = choose(logits, rules, pool, places)
    token, turn = kept.nonzero().unbind(dim=1)
    return Pairs(token=token, expert=slot[token, turn], gate=gate[token, turn])


def seated(queue: Tensor, places: Tensor) -> Tensor:
    """(S,) whether each of S, in the order they come, finds a place in its queue.

    Args:
        queue: (S,) number of the queue that each stands in. places: (Q,) of every queue.
    """
    order = torch.sort(queue, stable=True).indices
    lengths = torch.bincount(queue, minlength=len(places))
    first = lengths.cumsum(0) - lengths
    turn = torch.arange(len(queue), device=queue.device) - first[queue[order]]
    return torch.empty_like(queue, dtype=torch.bool).index_copy_(0, order, turn < places[queue[order]])


def wide(logits: Tensor) -> Tensor:
    """In float32 at least: probabilities are compared, and narrower ones tie."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _tokens_choose(logits: Tensor, rules: Rules, pool: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, gate, whether it has a place), each (T, K): the slots with the largest softmax, ties to the lower number.

    All first choices take places before any second one.
    """
    probabilities = wide(logits).softmax(dim=-1)
    slot = _descending(probabilities, dim=-1)[:, : rules.top_k]
    chosen = probabilities.gather(-1, slot)
    gate = chosen / chosen.sum(dim=-1, keepdim=True) if rules.renormalise else chosen
    if places is None:
        return slot, gate, torch.ones_like(slot, dtype=torch.bool)
    order = _order(chosen.detach(), rules.priority)
    queue = (pool[:, None] * logits.shape[-1] + slot)[order].T.reshape(-1)
    found = seated(queue, places.repeat_interleave(logits.shape[-1])).view(-1, len(order)).T
    return slot, gate, torch.empty_like(found).index_copy_(0, order, found)


def _order(chosen: Tensor, priority: str | None) -> Tensor:
    """(T,) the order in which tokens take places, by their (T, K) weights (batch priority: arXiv 2106.05974, 4.1)."""
    if priority is None:
        return torch.arange(len(chosen), device=chosen.device)
    return _descending(chosen[:, 0] if priority == "max" else chosen.sum(dim=-1), dim=0)


def _experts_choose(logits: Tensor, rules: Rules, pool: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, gate, whether the slot's expert takes the token), each (T, N); arXiv 2202.09368."""
    assert places is not None
    num_tokens, num_slots = logits.shape
    logits = wide(logits)
    probabilities = logits.softmax(dim=-1)
    slot = torch.arange(num_slots, device=logits.device).expand(num_tokens, num_slots)
    queue = (pool[:, None] * num_slots + slot).reshape(-1)
    best = logits if rules.over_tokens else probabilities
    order = _descending(best.detach().reshape(-1), dim=0)
    found = seated(queue[order], places.repeat_interleave(num_slots))
    kept = torch.empty_like(found).index_copy_(0, order, found).view(num_tokens, num_slots)
    if rules.over_tokens:
        return slot, _softmax_over_tokens(logits, kept, pool, len(places)), kept
    return slot, probabilities, kept


def _softmax_over_tokens(logits: Tensor, kept: Tensor, pool: Tensor, num_pools: int) -> Tensor:
    """(T, N) weights that add up to 1 over the tokens that a slot keeps in a pool."""
    where = pool[:, None].expand_as(logits)
    inner = logits.masked_fill(~kept, float("-inf"))
    shape = (num_pools, logits.shape[-1])
    largest = inner.detach().new_full(shape, float("-inf")).scatter_reduce(0, where, inner.detach(), "amax")
    powers = (inner - largest.gather(0, where)).exp()
    total = powers.new_zeros(shape).scatter_add(0, where, powers)
    return powers / total.gather(0, where)


def _descending(values: Tensor, dim: int) -> Tensor:
    return torch.sort(values, dim=dim, descending=True, stable=True).indices
