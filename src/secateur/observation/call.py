"""The call of an `experts` module: which tokens, which experts, which gates. One reader for all who listen to it.

Legend: T tokens of a call, K top-k, S = T * K token-slots in the order token * K + k, L live ones among them, D model
width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError

# What `experts` modules are called with, each by one of these names: (T, D) tokens, (T, K) expert ids, (T, K) gates.
# `modeling_secateur.py` is copied beside results and keeps a copy of its own; a test compares the two.
CALL = (
    ("hidden_states",),
    ("top_k_index", "router_indices", "selected_experts"),
    ("top_k_weights", "routing_weights"),
)
HIDDEN, IDS, GATES = range(len(CALL))


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertsCall:
    """One call of an `experts` module.

    Args:
        hidden: the tokens, (T, D), of some families (..., D) with T rows in all.
        index: (T, K) integers, the expert of each token-slot.
        gates: (T, K), what the outputs are multiplied with.
        args, kwargs: the call as it was given.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> Tensor:
        """(T, D)."""
        return self.hidden.reshape(len(self.index), -1)

    def with_index(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the same call with other expert ids, in the form in which it was given."""
        if len(self.args) > IDS:
            return (*self.args[:IDS], index, *self.args[IDS + 1 :]), self.kwargs
        name = next(name for name in CALL[IDS] if name in self.kwargs)
        return self.args, {**self.kwargs, name: index}

    def slot_by_slot(self, forward: Callable[..., Tensor], live: Tensor | None = None) -> Tensor:
        """(L, D) outputs before the gates: `forward` runs each token-slot as a token of its own, with the gate 1.

        Args:
            live: (L,) the token-slots to run; all S without it.
        """
        if live is None:
            live = torch.arange(self.index.numel(), device=self.index.device)
        # Some families give their result the type of the gates, which may be narrower than that of the tokens.
        wide = torch.promote_types(self.gates.dtype, self.hidden.dtype)
        if not len(live):
            return self.tokens.new_zeros(0, self.tokens.shape[1], dtype=wide)
        slots = self.tokens[live // self.index.shape[1]]
        ones = self.gates.new_ones(len(live), 1, dtype=wide)
        return forward(slots, self.index.reshape(-1)[live, None], ones).reshape(len(live), -1)

    def summed(self, outputs: Tensor, live: Tensor) -> Tensor:
        """What the module returns when only the token-slots `live` (L,) are computed, from their (L, D) outputs.

        The gates are applied here, and the K results of a token are added up as transformers' grouped experts function
        does it.
        """
        weighted = outputs * self.gates.reshape(-1)[live, None]
        parts = weighted.new_zeros(self.index.numel(), weighted.shape[1]).index_copy(0, live, weighted)
        total: Tensor = parts.view(*self.index.shape, -1).sum(dim=1)
        return total.to(self.hidden.dtype).reshape(self.hidden.shape)


def read_call(experts: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertsCall:
    """The call of the module named `experts`.

    Raises:
        SecateurError: it does not have the common form (hidden, index, gates).
    """
    index, hidden, gates = read_index(experts, args, kwargs), _given(HIDDEN, args, kwargs), _given(GATES, args, kwargs)
    if not isinstance(hidden, Tensor) or hidden.shape[:-1].numel() != len(index):
        raise SecateurError(f"{experts}: expected {len(index)} tokens, as many as ids, found {_found(hidden)}")
    if not isinstance(gates, Tensor) or gates.shape != index.shape or not gates.is_floating_point():
        raise SecateurError(f"{experts}: expected gates of shape {tuple(index.shape)}, found {_found(gates)}")
    return ExpertsCall(hidden=hidden, index=index, gates=gates, args=args, kwargs=kwargs)


def read_index(experts: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The (T, K) expert ids of the call of the module named `experts`, for those who need no gates.

    Raises:
        SecateurError: there are no such ids.
    """
    index = _given(IDS, args, kwargs)
    if not isinstance(index, Tensor) or index.ndim != 2 or index.is_floating_point():
        raise SecateurError(
            f"{experts}: expected to be called with (hidden, expert ids (tokens, top-k), weights), found "
            f"{_found(index)} as the ids"
        )
    return index


def _given(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else next((kwargs[name] for name in CALL[place] if name in kwargs), None)


def _found(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
