"""Of which tensors of which parent is a new tensor made, and how? Read off the bytes that are written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from secateur.model_folder.rewrite.computed import Beside, Mean, Part
from secateur.model_folder.rewrite.pieces import Copy, NewTensor
from secateur.upcycling.parents import Parents
from secateur.upcycling.recipe import ROUTERS


def origins(parents: Parents, tensors: Sequence[NewTensor]) -> dict[str, dict[str, Any]]:
    """What each tensor is, as JSON.

    {tensor: {"made": "copied", "averaged" or "router", "of": ["number of the parent:name", ...], "times": 4.0}}, the
    last where it is not 1. Of experts that are pieces of an FFN, `division` or their order says which neurons they are.
    """
    places: dict[str, list[tuple[int, str]]] = {}
    for number, parent in enumerate(parents.each):
        for name, tensor in parent.files.tensors.items():
            if tensor.length:
                places.setdefault(parent.file(tensor, number), []).append((tensor.start, f"{number}:{name}"))
    for found in places.values():
        found.sort()

    def name_of(copy: Copy) -> str:
        inside = places[copy.file]
        return inside[bisect_right(inside, (copy.start, "\U0010ffff")) - 1][1]

    told: dict[str, dict[str, Any]] = {}
    for new in tensors:
        copies = [copy for piece in new.pieces for copy in _copies(piece) if copy.length]
        if any(copy.file == ROUTERS for copy in copies):
            told[new.name] = {"made": "router", "of": []}
            continue
        made = "averaged" if any(isinstance(piece, Mean) for piece in new.pieces) else "copied"
        told[new.name] = {"made": made, "of": list(dict.fromkeys(map(name_of, copies)))}
        for piece in new.pieces:
            if isinstance(piece, Part) and piece.factor != 1:
                told[new.name]["times"] = piece.factor
    return told


def _copies(piece: Any) -> Iterator[Copy]:
    if isinstance(piece, Copy):
        yield piece
    elif isinstance(piece, Part):
        yield piece.source
    elif isinstance(piece, Mean | Beside):
        yield from piece.sources
