"""The loads that experts are placed for, from each of the files that hold some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from secateur.errors import SecateurError
from secateur.files.json import parse_json, read_json
from secateur.files.opened import opened
from secateur.files.records import Count, Finite, Layer, as_record

Loads = dict[int, list[float]]

OfLayer = Annotated[list[Count | Finite], Meta(description="a list of numbers, one for each expert")]
LAYERS: Any = Annotated[
    dict[Layer, OfLayer], Meta(min_length=1, description="an object with a list of loads for each layer")
]


def read_loads(path: Path) -> Loads:
    """{layer: load of each expert} from JSON, saved statistics, or the last window of a run's loads.jsonl.

    Raises:
        SecateurError: the file cannot be read, is not strict JSON, or holds something else; the message names it.
    """
    if path.suffix == ".safetensors":
        return _stored(path)
    if path.suffix == ".jsonl":
        return _loads(parse_json(_last_line(path), str(path), constants=False), path)
    return _loads(read_json(path, constants=False), path)


def _stored(path: Path) -> Loads:
    from secateur.stats import RouterStats

    try:
        return _of(RouterStats.load(path))
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error


def _last_line(path: Path) -> bytes:
    """The last window. A line without an end is what a killed writer leaves: it does not count."""
    with opened(path, pipes=True) as file:
        complete = file.read().split(b"\n")[:-1]
    if not complete:
        raise SecateurError(f"{path}: no line in it, expected at least one window of loads")
    return complete[-1]


def _loads(data: Any, path: Path) -> Loads:
    if isinstance(data, dict) and "format" in data:
        from secateur.stats import RouterStats

        try:
            return _of(RouterStats.from_json(data))
        except SecateurError as error:
            raise SecateurError(f"{path}: {error}") from error
    if isinstance(data, dict) and "layers" in data:  # a line of loads.jsonl
        data = data["layers"]
    layers: Loads = as_record(data, LAYERS, str(path))
    return dict(sorted(layers.items()))


def as_loads(given: Mapping[int, Sequence[float]], name: str) -> Loads:
    """Loads that a caller has at hand, checked as those of a file are; `name` is theirs, for messages.

    Raises:
        SecateurError: a layer that is no number from 0, or a load that is not finite or is below 0.
    """
    data = {
        str(layer): [float(load) if not isinstance(load, int) else load for load in of_layer]
        for layer, of_layer in given.items()
    }
    layers: Loads = as_record(data, LAYERS, name)
    return dict(sorted(layers.items()))


def _of(stats: Any) -> Loads:
    return {layer: [*counts] for layer, counts in stats.loads().items()}
