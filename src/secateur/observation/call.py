"""The call of an `experts` module: which tokens, which experts, which gates. One reader for all who listen to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families import MoEBlock

INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts")
WEIGHT_NAMES = ("top_k_weights", "routing_weights")


def tokens_and_mask(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A (B, S) tensor of the tokens that a model is called with, and the mask of that shape, 0 for padding, if any.

    Args:
        signature: of the model's forward.

    Raises:
        SecateurError: a mask of another shape or kind, or a model that is called with images.
    """
    given = signature.bind_partial(*args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    if tokens is None and "inputs_embeds" not in given:
        raise SecateurError(
            f"expected a call with input_ids or inputs_embeds, found {sorted(given)}; the experts of a model of images "
            "are observed in evaluation, with observation.activations.ActivationObserver"
        )
    tokens = given["inputs_embeds"][..., 0] if tokens is None else tokens
    if mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape):
        return tokens, mask
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise SecateurError(
        f"attention_mask: expected shape {tuple(tokens.shape)} like the tokens (padding cannot be told "
        f"otherwise), found {found}"
    )


def routed_index(block: MoEBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The (T, K) expert ids that an `experts` module is called with.

    Raises:
        SecateurError: the call does not have the common form (hidden, index, weights).
    """
    index = args[1] if len(args) > 1 else next((kwargs[name] for name in INDEX_NAMES if name in kwargs), None)
    if not isinstance(index, Tensor) or index.ndim != 2 or index.is_floating_point():
        found = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise SecateurError(
            f"{block.name}.experts: expected to be called with (hidden, expert ids (tokens, top-k), weights), found "
            f"{found} as the ids"
        )
    return index


def routed_gates(block: MoEBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The (T, K) numbers that an `experts` module is told to multiply the outputs with."""
    gates = args[2] if len(args) > 2 else next((kwargs[name] for name in WEIGHT_NAMES if name in kwargs), None)
    index = routed_index(block, args, kwargs)
    if not isinstance(gates, Tensor) or gates.shape != index.shape or not gates.is_floating_point():
        found = f"{gates.dtype} {tuple(gates.shape)}" if isinstance(gates, Tensor) else type(gates).__name__
        raise SecateurError(f"{block.name}.experts: expected gates of shape {tuple(index.shape)}, found {found}")
    return gates


def slot_by_slot(
    forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, gates: Tensor
) -> Tensor:
    """(S, D) outputs before the gates, in the order token * K + k."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    slots = hidden.reshape(len(index), -1).repeat_interleave(index.shape[1], dim=0)
    # Some families give their result the type of the gates, which may be narrower than that of the outputs.
    ones = torch.ones_like(gates, dtype=torch.promote_types(gates.dtype, hidden.dtype))
    return forward(slots, index.reshape(-1, 1), ones.reshape(-1, 1)).reshape(slots.shape)
