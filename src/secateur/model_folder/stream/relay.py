"""Let one decoder layer at a time take part in the model's own forward, the others being passed over.

So masks, positions and whatever else a model computes before and between its layers are its own, for every family. A
layer that has run before hands on NaN: should anything but the next layer's hidden states depend on it, that is seen
and refused, and never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.model_folder.stream.shared import NOTHING, Shared, identities, left_in, put_back

HIDDEN = "hidden_states"
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class LayerDone(Exception):  # noqa: N818 - no error: it ends a forward that has done its work
    """Raised within the model when the layer at work has been passed."""


class Relay:
    """Takes the place of the forwards of all decoder layers of one model.

    form: how a layer returns hidden states: "tensor", or "tuple N" for a tuple of N of which the others are None. The
    first layer to run shows it. shared: what layers have left so far for later ones, of the batch that `run` was for.
    """

    def __init__(self, layers: nn.ModuleList, form: str | None) -> None:
        self.form = form
        self.shared: Shared = NOTHING
        self._layers = layers
        self._stage, self._called = 0, 0
        self._given: Tensor | None = None
        self._taken: Tensor | None = None
        self._checks = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, layers do not run but as `run` says."""
        for number, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._forward, number, layer.forward)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    def run(
        self, stage: int, given: Tensor | None, call: Callable[[], Any], *, checks: bool, shared: Shared = NOTHING
    ) -> tuple[Any, Tensor]:
        """(what `call`, the forward of the model, returns; hidden states) of one batch.

        Args:
            stage: the layer at work, which gets `given` for the hidden states that it is called with; the first layer
                gets those. The forward ends with it: None is returned, with the next layer's hidden states or, of the
                last layer, its own. A stage behind the last layer has it return `given`, and the forward goes on.
            checks: look whether layers exchange more than hidden states and tensors in a mapping.
            shared: what earlier layers left of this batch.

        Raises:
            SecateurError: they do, or are not called once each in their order.
        """
        self._stage, self._given, self._called, self._taken, self._checks = stage, given, 0, None, checks
        self.shared = shared
        try:
            output = call()
        except LayerDone:
            assert self._taken is not None
            return None, self._taken
        finally:
            self._given = None
        if self._called != len(self._layers) or stage < len(self._layers):
            raise SecateurError(f"{self._called} of {len(self._layers)} decoder layers were called, expected all")
        assert given is not None
        return output, given

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if number != self._called:
            raise SecateurError(f"decoder layer {number} was called where layer {self._called} was expected")
        self._called += 1
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, Tensor):
            raise SecateurError(f"decoder layer {number} is called with {type(hidden).__name__}, expected a tensor")
        if number > self._stage:
            self._taken = hidden
            raise LayerDone
        last = number == len(self._layers) - 1
        if number < self._stage:
            if last:
                assert self._given is not None
                return self._returned(self._given)
            return self._returned(torch.full_like(hidden, torch.nan) if number == 0 else hidden)
        result = self._work(number, forward, hidden, args, kwargs)
        if last:
            self._taken = result if isinstance(result, Tensor) else result[0]
            raise LayerDone
        return result

    def _work(
        self, number: int, forward: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        others: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        del others[0 if args else HIDDEN]
        if self._checks:
            _refuse_poisoned(number, others)
        put_back(others, self.shared, hidden.device)
        before, lengths = identities(others), _lengths(others)
        given = hidden if self._given is None else self._given
        result = forward(given, *args[1:], **kwargs) if args else forward(**{**kwargs, HIDDEN: given})
        if _lengths(others) != lengths:
            raise SecateurError(f"decoder layer {number} leaves values for later layers; {UNABLE}")
        try:
            self.shared = {**self.shared, **left_in(others, before, UNABLE)}
        except SecateurError as error:
            raise SecateurError(f"decoder layer {number} {error}") from error
        form = _form(number, result)
        if self.form not in (None, form):
            raise SecateurError(f"decoder layer {number} returns a {form}, an earlier one a {self.form}; {UNABLE}")
        self.form = form
        return result

    def _returned(self, hidden: Tensor) -> Any:
        assert self.form is not None
        if self.form == "tensor":
            return hidden
        return (hidden, *[None] * (int(self.form.split()[1]) - 1))


UNABLE = "layers of this model exchange more than hidden states, so it cannot be run layer by layer; load it as a whole"


def _form(number: int, result: Any) -> str:
    if isinstance(result, Tensor):
        return "tensor"
    if type(result) is tuple and result and isinstance(result[0], Tensor):
        if all(other is None for other in result[1:]):
            return f"tuple {len(result)}"
        found = ", ".join(type(other).__name__ for other in result[1:])
        raise SecateurError(f"decoder layer {number} also returns {found}; {UNABLE}")
    raise SecateurError(f"decoder layer {number} returns {type(result).__name__}, expected hidden states")


def _refuse_poisoned(number: int, others: dict[Any, Any]) -> None:
    for name, value in others.items():
        for leaf in _leaves(value):
            if isinstance(leaf, Tensor):
                if leaf.is_floating_point() and bool(leaf.isnan().any()):
                    raise SecateurError(f"decoder layer {number} gets `{name}` from earlier layers; {UNABLE}")
            elif not isinstance(leaf, PLAIN):
                raise SecateurError(f"decoder layer {number} gets `{name}`, a {type(leaf).__name__}; {UNABLE}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _lengths(others: dict[Any, Any]) -> list[int]:
    """How much the lists hold that a layer could leave something in."""
    return [len(value) for value in others.values() if isinstance(value, list)]
