"""Which tokens of a model's call are real, and which are padding: told by its mask, or by labels and a pad id.

Legend: B rows, S tokens a row, P tokens of before that a cache holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError

IGNORED = -100  # the label of a token that is no target, as torch's cross-entropy has it


def tokens_and_mask(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A (B, S) tensor of the tokens that a model is called with, and which are real, (B, S) bool; None: all are.

    Args:
        signature: of the model's forward.

    Raises:
        SecateurError: a mask that does not tell, or a model that is called with images.
    """
    given = by_name(signature, args, kwargs)
    tokens = tokens_of(given)
    return tokens, real_by_mask(given.get("attention_mask"), tokens, given.get("past_key_values"))


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name; those that the forward does not name are left out if it takes none such."""
    parameters = signature.parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    given = signature.bind_partial(*args, **kwargs).arguments
    more = next((name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD), "")
    return {**given.pop(more, {}), **given}


def tokens_of(given: Mapping[str, Any]) -> Tensor:
    """(B, S): the ids, or of embeddings the first feature.

    Raises:
        SecateurError: neither is given.
    """
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    tokens: Tensor | None = ids if embeddings is None else embeddings[..., 0]
    if tokens is None:
        raise SecateurError(
            f"expected a call with input_ids or inputs_embeds, found {sorted(given)}; the experts of a model of images "
            "are observed in evaluation, with observation.activations.ActivationObserver"
        )
    return tokens


def real_by_mask(mask: Any, tokens: Tensor, cache: Any = None) -> Tensor | None:
    """Which of `tokens` (B, S) an attention mask says are real, (B, S) bool; None where it has nothing to say.

    Read are: (B, S), where anything but 0 is real (numbers of packed segments too); (B, P + S) with a cache of P
    tokens; (B, 1, S, S), bool or added to the scores, where a token that may not attend to itself is padding; and a
    dict of masks by the kind of attention, which agree in that.

    Raises:
        SecateurError: a mask of another form, which does not tell.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return None
    rows, length = tokens.shape
    if isinstance(mask, Tensor):
        if mask.shape == tokens.shape:
            return mask != 0
        before = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        if mask.shape == (rows, before + length):
            return mask[:, before:] != 0
        if mask.ndim == 4 and mask.shape[0] in (1, rows) and mask.shape[2:] == (length, before + length):
            itself = mask[:, 0].diagonal(before, dim1=-2, dim2=-1)  # (B or 1, S)
            # masks that are added have the lowest number, or -inf, where attention is barred
            real = itself > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else itself != 0
            return real.expand(rows, length)
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise SecateurError(
        f"attention_mask: expected shape {tuple(tokens.shape)} like the tokens, or (rows, 1, queries, keys), found "
        f"{found}: it does not tell which tokens are padding; LAEP takes count_mask, a function that does"
    )


def padding_by_labels(ids: Tensor, labels: Tensor, pad_id: int) -> Tensor:
    """Which of `ids` (B, S) are padding, (B, S) bool: at the ends of a row, the pad id without a target.

    In the middle of a row the pad id may be a word: many tokenizers pad with the token that ends a text.
    """
    return at_the_ends((labels == IGNORED) & (ids == pad_id))


def at_the_ends(flags: Tensor) -> Tensor:
    """The runs of True that begin or end a row of `flags` (B, S), as bool."""
    numbers = flags.to(torch.int8)
    ends = numbers.cumprod(1) + numbers.flip(1).cumprod(1).flip(1)
    return ends > 0
