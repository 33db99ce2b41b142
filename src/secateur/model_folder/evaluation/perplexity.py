"""How well models predict blocks of tokens, and how sure a difference between two models on the same blocks is.

Shapes: N blocks, B blocks of a batch, S tokens of a block, V vocabulary. Losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.errors import SecateurError
from secateur.model_folder.evaluation.bootstrap import paired, standard_error


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLosses:
    """Of one model. loss: (N,) float64, summed over the predicted tokens of each block. tokens: (N,) how many."""

    loss: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        wrong = (~torch.isfinite(self.loss)).nonzero().flatten().tolist()
        if wrong:
            raise SecateurError(f"the loss of block {wrong[0]} is {float(self.loss[wrong[0]])}, expected a number")
        if not int(self.tokens.sum()):
            raise SecateurError("no token to predict, expected blocks of at least 2")

    @property
    def mean(self) -> float:
        """Loss a token."""
        return float(self.loss.sum() / self.tokens.sum())

    def at(self, rows: Sequence[int]) -> BlockLosses:
        return BlockLosses(loss=self.loss[list(rows)], tokens=self.tokens[list(rows)])

    @classmethod
    def joined(cls, parts: Sequence[BlockLosses]) -> BlockLosses:
        return cls(loss=torch.cat([part.loss for part in parts]), tokens=torch.cat([part.tokens for part in parts]))


def block_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> BlockLosses:
    """Of a batch: logits (B, S, V), input_ids (B, S), attention_mask (B, S) with 0 for padding, or None.

    A token counts where it and the one before it are no padding. Computed in float32, block by block.
    """
    losses, counts = [], []
    for row, ids in enumerate(input_ids):
        each = cross_entropy(logits[row, :-1].float(), ids[1:].to(logits.device), reduction="none").double().cpu()
        mask = torch.ones(len(ids)) if attention_mask is None else attention_mask[row].cpu()
        counted = (mask[1:] > 0) & (mask[:-1] > 0)
        losses.append(each[counted].sum())
        counts.append(counted.sum())
    return BlockLosses(loss=torch.stack(losses), tokens=torch.stack(counts))


def summary(losses: BlockLosses, domains: Sequence[str]) -> dict[str, Any]:
    """Perplexity and what belongs to it, of all blocks and of each domain, as JSON; `domains` names that of each block.

    The standard error is that of the loss a token, blocks taken as the sample; null for a single block.
    """
    rows: dict[str, list[int]] = {}
    for row, domain in enumerate(domains):
        rows.setdefault(domain, []).append(row)
    return _numbers(losses) | {"domains": {domain: _numbers(losses.at(mine)) for domain, mine in sorted(rows.items())}}


def difference(losses: BlockLosses, reference: BlockLosses, *, seed: int = 0) -> dict[str, Any]:
    """How much more loss a token than `reference` on the same blocks, paired block by block, as JSON.

    "low" and "high" are a 95 % range by bootstrap samples of the blocks; null for a single block.
    """
    if not torch.equal(losses.tokens, reference.tokens):
        raise SecateurError("the losses are not of the same blocks")
    found = paired(losses.loss - reference.loss, losses.tokens, seed=seed)
    return {"loss": found.pop("mean"), **found}


def _numbers(losses: BlockLosses) -> dict[str, Any]:
    return {
        "perplexity": _exp(losses.mean),
        "loss": losses.mean,
        "standard_error": standard_error(losses.loss, losses.tokens),
        "tokens": int(losses.tokens.sum()),
        "blocks": len(losses.tokens),
    }


def _exp(value: float) -> float | None:
    """null where it is beyond what a number can hold."""
    return math.exp(value) if value < 700 else None


def as_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The results of several models as a table, its head first."""
    domains = list(models[0]["domains"])
    shown = domains if len(domains) > 1 else []
    head = ["model", "perplexity", "loss a token", *shown]
    head += ["minus the first (95 % range)"] if len(models) > 1 else []
    rows = [head]
    for model in models:
        error = model["standard_error"]
        row = [
            model["path"],
            _plain(model["perplexity"]),
            f"{model['loss']:.4f}" + (f" ± {error:.4f}" if error else ""),
        ]
        row += [_plain(model["domains"][domain]["perplexity"]) for domain in shown]
        if len(models) > 1:
            row.append(_difference(model["difference"]))
        rows.append(row)
    return rows


def _plain(value: float | None) -> str:
    return "beyond numbers" if value is None else f"{value:.3f}" if value < 10_000 else f"{value:.3e}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    within = "" if found["low"] is None else f" ({found['low']:+.4f} to {found['high']:+.4f})"
    return f"{found['loss']:+.4f}{within}"
