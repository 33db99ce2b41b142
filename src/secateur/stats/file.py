"""How do statistics get into a file and back, and what is their digest? Tensors first; nothing in a file is trusted.

A file holds `layers.N.num_tokens` (1,) and `layers.N.token_count` (E,), int64, and `layers.N.SUM`, float64. It is
written as the first version that knows its sums: 1 counts only, 2 the first five sums, 3 every sum of the table.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import parse_json
from secateur.files.limits import MAX_LAYER
from secateur.files.opened import opened
from secateur.files.safetensors_header import Entry, Header, header_bytes, read_header, with_sorted_metadata
from secateur.stats.layer import LayerStats
from secateur.stats.sums import SUMS

FORMAT = "secateur-stats"
COUNTS = ("num_tokens", "token_count")
SHAPED = 3
# version -> the sums that a file may hold; the first two stay as they are, since other readers know them
VERSIONS: dict[int, tuple[str, ...]] = {
    1: (),
    2: ("weight_sum", "norm_sum", "norm_square_sum", "weighted_norm_sum", "max_activation"),
    SHAPED: tuple(SUMS),
}
NAME = re.compile(r"layers\.(0|[1-9][0-9]*)\.(\w+)")
DTYPES = {"I64": "<i8", "F64": "<f8"}  # as numpy calls them


def version_of(sums: Collection[str]) -> int:
    """The first version that knows these sums."""
    return next(version for version, known in VERSIONS.items() if set(sums) <= set(known))


def digest_of(layers: Mapping[int, LayerStats]) -> str:
    """sha256 (hex) over names, types, shapes and little-endian bytes of all tensors, in the order of their names."""
    found = hashlib.sha256(f"{FORMAT}/{SHAPED}\n".encode())
    for layer, stats in layers.items():
        for name, (dtype, value) in sorted(_tensors(layer, stats).items()):
            found.update(f"{name} {dtype} {list(value.shape)}\n".encode())
            found.update(_as_bytes(value + 0, dtype))  # no zero below 0, which equals the other
    return found.hexdigest()


def write_layers(path: Path, layers: Mapping[int, LayerStats], about: Mapping[str, Any] | None) -> None:
    """Write a file; see `RouterStats.save`."""
    version = version_of(next(iter(layers.values())).sums)
    metadata = {"format": f"{FORMAT}/{version}"}
    if about is not None:
        metadata["about"] = json.dumps(about, sort_keys=True, allow_nan=False)
    tensors = {name: one for layer, stats in layers.items() for name, one in _tensors(layer, stats).items()}
    if version == SHAPED:
        atomic_write(path, _pieces(tensors, metadata))
    else:  # in the order of the library, byte for byte as before
        plain = {name: value for name, (_, value) in tensors.items()}
        atomic_write(path, with_sorted_metadata(safetensors.torch.save(plain, metadata=metadata)))


def read_layers(path: Path) -> tuple[dict[int, LayerStats], Any]:
    """(layers, what is said about them or None) of a file, whose header is checked before a tensor is read.

    Raises:
        SecateurError: the file cannot be read, or holds something else.
    """
    try:
        header = read_header(path)
    except SecateurError as error:
        raise SecateurError(f"cannot be read ({error})") from error
    with opened(path) as file:
        entries = _checked_entries(header)
        about = parse_json(header.metadata.get("about", "null"), "about")
        return {layer: _read_layer(file, layer, entries[layer]) for layer in sorted(entries)}, about


def _tensors(layer: int, stats: LayerStats) -> dict[str, tuple[str, Tensor]]:
    """name -> (type, tensor)."""
    counts = {"token_count": stats.token_count, "num_tokens": torch.tensor([stats.num_tokens])}
    named = {name: ("I64", value) for name, value in counts.items()} | {
        name: ("F64", value) for name, value in stats.sums.items()
    }
    return {f"layers.{layer}.{name}": one for name, one in named.items()}


def _pieces(tensors: Mapping[str, tuple[str, Tensor]], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield header_bytes({name: (dtype, tuple(value.shape)) for name, (dtype, value) in tensors.items()}, metadata)
    for dtype, value in tensors.values():
        yield _as_bytes(value, dtype)


def _as_bytes(value: Tensor, dtype: str) -> memoryview:
    return np.ascontiguousarray(value.numpy().astype(DTYPES[dtype], copy=False)).reshape(-1).data.cast("B")


def _checked_entries(header: Header) -> dict[int, dict[str, Entry]]:
    """Layer -> name -> where its tensor is, when all of them can be those of statistics."""
    versions = {f"{FORMAT}/{version}": known for version, known in VERSIONS.items()}
    found = header.metadata.get("format")
    if found not in versions:
        raise SecateurError(f"format is {found!r:.80}, expected {', '.join(versions)}")
    layers: dict[int, dict[str, Entry]] = {}
    for name, entry in header.entries.items():
        match = NAME.fullmatch(name)
        if match is None or int(match[1][:9]) > MAX_LAYER or match[2] not in (*COUNTS, *versions[found]):
            raise SecateurError(f"unknown tensor {name:.200}")
        layers.setdefault(int(match[1]), {})[match[2]] = entry
    for layer, entries in layers.items():
        if missing := [name for name in COUNTS if name not in entries]:
            raise SecateurError(f"'layers.{layer}.{missing[0]}' is missing, found {', '.join(sorted(entries))}")
        sizes: dict[str, int] = {}
        for name in (*COUNTS, *(name for name in SUMS if name in entries)):
            _check_entry(f"layers.{layer}", name, entries[name], sizes)
    return layers


def _check_entry(layer: str, name: str, entry: Entry, sizes: dict[str, int]) -> None:
    """`sizes` is {axis: its size in the entries that were checked before}."""
    found = f"{entry.dtype} {entry.shape}"
    if name in SUMS:
        try:
            SUMS[name].check_shape(found, entry.shape if entry.dtype == "F64" else (), sizes)
        except SecateurError as error:
            raise SecateurError(f"{layer}.{error}") from None
        return
    fits = entry.dtype == "I64" and len(entry.shape) == 1 and entry.shape[0] > 0
    if not fits or (name == "num_tokens" and entry.shape != (1,)):
        expected = "(1,)" if name == "num_tokens" else "(experts,)"
        raise SecateurError(f"{layer}.{name} is {found}, expected int64 {expected}")
    if name == "token_count":
        (sizes["E"],) = entry.shape


def _read_layer(file: IO[bytes], layer: int, entries: Mapping[str, Entry]) -> LayerStats:
    tensors = {name: _read(file, entry) for name, entry in entries.items()}
    num_tokens = int(tensors.pop("num_tokens"))
    try:
        return LayerStats(num_tokens=num_tokens, **tensors)
    except SecateurError as error:
        raise SecateurError(f"layer {layer}: {error}") from error


def _read(file: IO[bytes], entry: Entry) -> Tensor:
    file.seek(entry.start)
    values = np.fromfile(file, dtype=DTYPES[entry.dtype], count=math.prod(entry.shape))
    if values.nbytes != entry.length:
        raise SecateurError(f"it ends after {values.nbytes} of {entry.length} bytes of a tensor")
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False)).reshape(entry.shape)
