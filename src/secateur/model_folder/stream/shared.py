"""What layers leave for later ones beside hidden states: tensors in a mapping that all layers are called with.

So some models share keys and values between layers. The mapping is new in every forward, and a forward runs one layer
only; so what one leaves is kept, and put back before a later one runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from secateur.errors import SecateurError

Shared = Mapping[str, Tensor]  # "name of the argument/key/place in a tuple" -> tensor
NOTHING: Shared = MappingProxyType({})


def put_back(others: Mapping[Any, Any], shared: Shared, device: Any) -> None:
    """Fill the mappings among the arguments of a layer, in place, with what earlier layers left."""
    tuples: dict[tuple[str, str], list[Tensor]] = {}
    for flat, tensor in sorted(shared.items(), key=lambda item: (item[0].rpartition("/")[0], int(item[0][-1]))):
        name, key, _ = flat.split("/")
        tuples.setdefault((name, key), []).append(tensor.to(device))
    for (name, key), tensors in tuples.items():
        others[name][key] = tuple(tensors)


def left_in(others: Mapping[Any, Any], before: Mapping[tuple[Any, Any], int], unable: str) -> dict[str, Tensor]:
    """What a layer put into the mappings among its arguments; `before` is what `identities` gave of them.

    Raises:
        SecateurError: something else than a few tensors under a name; `unable` ends the sentence.
    """
    left: dict[str, Tensor] = {}
    for name, key, value in _entries(others):
        if before.get((name, key)) == id(value):
            continue
        named = isinstance(name, str) and isinstance(key, str) and "/" not in key
        if not named or type(value) is not tuple or not all(isinstance(one, Tensor) for one in value) or len(value) > 9:
            raise SecateurError(f"leaves {key!r:.60} in `{name}`, a {type(value).__name__}; {unable}")
        left |= {f"{name}/{key}/{place}": one for place, one in enumerate(value)}
    return left


def identities(others: Mapping[Any, Any]) -> dict[tuple[Any, Any], int]:
    """By which a value that a layer replaces is seen."""
    return {(name, key): id(value) for name, key, value in _entries(others)}


def _entries(others: Mapping[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    for name, box in others.items():
        if isinstance(box, MutableMapping):
            yield from ((name, key, value) for key, value in box.items())
