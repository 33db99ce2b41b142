"""What the routers of a model did: sums over tokens only, so that ranks, micro-batches and windows add up.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files import atomic_write

FORMAT = "secateur-stats"
VERSION = 1
FIELDS = ("num_tokens", "token_count")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStats:
    """The routing of one layer.

    Args:
        num_tokens: tokens the router saw.
        token_count: (E,) integers, tokens routed to each expert; its sum is top_k times `num_tokens` where no token is
            lost. Kept as an int64 copy on the CPU, so that an accumulator on a device may go on counting.

    Raises:
        SecateurError: a negative or non-integer count, another shape, or no expert.
    """

    num_tokens: int
    token_count: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 0:
            raise SecateurError(f"num_tokens is {self.num_tokens!r}, expected an integer of 0 or more")
        count = self.token_count
        if not isinstance(count, Tensor) or count.dim() != 1 or not count.numel():
            shape = tuple(count.shape) if isinstance(count, Tensor) else repr(count)
            raise SecateurError(f"token_count is {shape}, expected a tensor of shape (experts,)")
        if count.dtype not in INTEGERS:
            raise SecateurError(f"token_count has type {count.dtype}, expected integers")
        count = count.detach().to("cpu", torch.int64, copy=True)
        if bool((count < 0).any()):
            raise SecateurError(
                f"token_count of expert {int(count.argmin())} is {int(count.min())}, expected 0 or more"
            )
        object.__setattr__(self, "token_count", count)

    @property
    def num_experts(self) -> int:
        return self.token_count.numel()

    def __add__(self, other: LayerStats) -> LayerStats:
        if self.num_experts != other.num_experts:
            raise SecateurError(f"statistics of {self.num_experts} and of {other.num_experts} experts do not add up")
        return LayerStats(
            num_tokens=self.num_tokens + other.num_tokens, token_count=self.token_count + other.token_count
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerStats):
            return NotImplemented
        return self.num_tokens == other.num_tokens and torch.equal(self.token_count, other.token_count)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Layer id -> LayerStats, ascending; at least one layer."""

    layers: dict[int, LayerStats]

    def __post_init__(self) -> None:
        if not self.layers:
            raise SecateurError("statistics: no layer, expected at least one")
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise SecateurError(f"statistics: layer id is {layer!r}, expected an integer of 0 or more")
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    def __add__(self, other: RouterStats) -> RouterStats:
        """The statistics of both together.

        Raises:
            SecateurError: they are not about the same layers with the same number of experts each.
        """
        if self.layers.keys() != other.layers.keys():
            only = sorted(self.layers.keys() ^ other.layers.keys())
            raise SecateurError(f"statistics do not add up: layers {only} are in one of them only")
        layers = {}
        for layer, stats in self.layers.items():
            try:
                layers[layer] = stats + other.layers[layer]
            except SecateurError as error:
                raise SecateurError(f"layer {layer}: {error}") from None
        return RouterStats(layers=layers)

    def reordered(self, orders: Mapping[int, Sequence[int]]) -> RouterStats:
        """The same statistics under other expert ids, {layer: order[new] = old}; other layers stay."""
        layers = dict(self.layers)
        for layer, order in orders.items():
            stats = layers[layer]
            layers[layer] = LayerStats(num_tokens=stats.num_tokens, token_count=stats.token_count[list(order)])
        return RouterStats(layers=layers)

    def emptied(self) -> RouterStats:
        """Statistics of the same layers and experts in which nothing was counted."""
        return RouterStats.from_loads({layer: [0] * one.num_experts for layer, one in self.layers.items()}, 0)

    @classmethod
    def from_loads(cls, loads: Mapping[int, Sequence[int]], num_tokens: int) -> RouterStats:
        """`loads` is layer -> tokens of each expert; every layer saw `num_tokens` tokens."""
        return cls(layers={layer: _layer(f"layer {layer}", num_tokens, counts) for layer, counts in loads.items()})

    def loads(self) -> dict[int, list[int]]:
        """Layer -> tokens of each expert."""
        return {layer: stats.token_count.tolist() for layer, stats in self.layers.items()}

    def digest(self) -> str:
        """sha256 (hex) of the content: equal statistics have equal digests, on every machine."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        layers = {
            str(layer): {"num_tokens": stats.num_tokens, "token_count": stats.token_count.tolist()}
            for layer, stats in self.layers.items()
        }
        return {"format": FORMAT, "version": VERSION, "layers": layers}

    @classmethod
    def from_json(cls, data: Any) -> RouterStats:
        """The statistics that `to_json` wrote.

        Raises:
            SecateurError: another format or version, a missing or unknown entry, or an invalid count.
        """
        if not isinstance(data, dict) or data.keys() != {"format", "version", "layers"}:
            raise SecateurError(f"statistics: found {data!r:.80}, expected format, version and layers")
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            found = (data["format"], data["version"])
            raise SecateurError(f"statistics: format and version are {found}, expected {(FORMAT, VERSION)}")
        if not isinstance(data["layers"], dict):
            raise SecateurError(f"statistics: layers is {data['layers']!r:.80}, expected an object")
        layers = {}
        for name, entry in data["layers"].items():
            if not re.fullmatch("0|[1-9][0-9]*", str(name)):
                raise SecateurError(f"statistics: layer id is {name!r}, expected a whole number")
            if not isinstance(entry, dict) or entry.keys() != set(FIELDS):
                raise SecateurError(f"statistics, layer {name}: found {entry!r:.80}, expected {' and '.join(FIELDS)}")
            layers[int(name)] = _layer(f"statistics, layer {name}", entry["num_tokens"], entry["token_count"])
        return cls(layers=layers)

    def save(self, path: Path | str) -> None:
        """Write the statistics as safetensors: `layers.N.token_count` (E,) and `layers.N.num_tokens` (1,)."""
        tensors = {}
        for layer, stats in self.layers.items():
            tensors[f"layers.{layer}.token_count"] = stats.token_count
            tensors[f"layers.{layer}.num_tokens"] = torch.tensor([stats.num_tokens])
        # One metadata entry: with several, safetensors writes them in no fixed order.
        atomic_write(Path(path), safetensors.torch.save(tensors, metadata={"format": f"{FORMAT}/{VERSION}"}))

    @classmethod
    def load(cls, path: Path | str) -> RouterStats:
        """Read a statistics file.

        Raises:
            SecateurError: the file cannot be read or holds something else; the message names it.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("format")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return cls._from_tensors(found, tensors)
        except SecateurError as error:
            raise SecateurError(f"statistics file {path}: {error}") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise SecateurError(f"statistics file {path}: cannot be read ({error})") from error

    @classmethod
    def _from_tensors(cls, found: str | None, tensors: Mapping[str, Tensor]) -> RouterStats:
        if found != f"{FORMAT}/{VERSION}":
            raise SecateurError(f"format is {found!r}, expected '{FORMAT}/{VERSION}'")
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"layers\.([^.]+)\.(num_tokens|token_count)", name)
            if match is None:
                raise SecateurError(f"unknown tensor {name}")
            value = tensor.tolist()
            parts.setdefault(match[1], {})[match[2]] = value[0] if match[2] == "num_tokens" and value else value
        return cls.from_json({"format": FORMAT, "version": VERSION, "layers": parts})


def _layer(name: str, num_tokens: Any, counts: Any) -> LayerStats:
    counts = list(counts) if isinstance(counts, Sequence) else [counts]
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int):
            raise SecateurError(f"{name}: a token count is {count!r}, expected an integer")
    try:
        return LayerStats(num_tokens=num_tokens, token_count=torch.tensor(counts, dtype=torch.int64))
    except (ValueError, OverflowError, RuntimeError) as error:
        raise SecateurError(f"{name}: {error}") from None
