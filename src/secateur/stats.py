"""What the routers of a model did: sums over tokens only, so that ranks, micro-batches and windows add up.

Training counts tokens only; observing a model also fills the sums that the activation criteria need.

Shapes: E experts of a layer. Symbols: g gate, f an expert's output before the gate, ||f|| its L2 norm.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import parse_json
from secateur.files.records import Count, Layer, as_record
from secateur.files.safetensors_header import with_sorted_metadata

FORMAT = "secateur-stats"
COUNTS = ("num_tokens", "token_count")
# (E,) float64 sum -> how two windows of it merge. A new sum is one line here and one field of LayerStats and SumsEntry.
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight_sum": torch.add,
    "norm_sum": torch.add,
    "norm_square_sum": torch.add,
    "weighted_norm_sum": torch.add,
    "max_activation": torch.maximum,
}
SIGNED_SUMS = ("weight_sum", "weighted_norm_sum")  # a gate may be negative, the rest may not
# version -> what a layer may hold; statistics without sums are written as version 1, which older readers know
VERSIONS = {1: COUNTS, 2: (*COUNTS, *SUMS)}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStats:
    """The routing of one layer.

    Args:
        num_tokens: tokens the router saw.
        token_count: (E,) integers, tokens routed to each expert; its sum is top_k times `num_tokens` where no token is
            lost. Kept as an int64 copy on the CPU, so that an accumulator on a device may go on counting.
        weight_sum: sum of g. All of these: (E,) float64, over the tokens routed to each expert, kept as CPU copies,
            or None where nothing recorded them.
        norm_sum: sum of ||f||.
        norm_square_sum: sum of ||f||^2.
        weighted_norm_sum: sum of g ||f||.
        max_activation: the largest absolute entry of f; it merges by maximum.

    Raises:
        SecateurError: a negative or non-integer count, another shape, or no expert; a sum that is not finite, or not 0
            for an expert that no token reached.
    """

    num_tokens: int
    token_count: Tensor
    weight_sum: Tensor | None = None
    norm_sum: Tensor | None = None
    norm_square_sum: Tensor | None = None
    weighted_norm_sum: Tensor | None = None
    max_activation: Tensor | None = None

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
        for name in SUMS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked_sum(name, getattr(self, name), count))

    @property
    def num_experts(self) -> int:
        return self.token_count.numel()

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums that were recorded, by name."""
        return {name: getattr(self, name) for name in SUMS if getattr(self, name) is not None}

    def __add__(self, other: LayerStats) -> LayerStats:
        if self.num_experts != other.num_experts:
            raise SecateurError(f"statistics of {self.num_experts} and of {other.num_experts} experts do not add up")
        mine, theirs = self.sums, other.sums
        if mine.keys() != theirs.keys():
            only = sorted(mine.keys() ^ theirs.keys())
            raise SecateurError(f"statistics do not add up: {', '.join(only)} are in one of them only")
        return LayerStats(
            num_tokens=self.num_tokens + other.num_tokens,
            token_count=self.token_count + other.token_count,
            **{name: SUMS[name](value, theirs[name]) for name, value in mine.items()},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerStats):
            return NotImplemented
        return self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def reordered(self, order: Sequence[int]) -> LayerStats:
        """The same statistics under other expert ids, order[new] = old."""
        taken = {name: value[list(order)] for name, value in self.sums.items()}
        return LayerStats(num_tokens=self.num_tokens, token_count=self.token_count[list(order)], **taken)

    def to_json(self) -> dict[str, Any]:
        lists = {name: value.tolist() for name, value in self.sums.items()}
        return {"num_tokens": self.num_tokens, "token_count": self.token_count.tolist(), **lists}


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Layer id -> LayerStats, ascending; at least one layer, and the same sums in all of them."""

    layers: dict[int, LayerStats]

    def __post_init__(self) -> None:
        if not self.layers:
            raise SecateurError("statistics: no layer, expected at least one")
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise SecateurError(f"statistics: layer id is {layer!r}, expected an integer of 0 or more")
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))
        for layer, stats in self.layers.items():
            if stats.sums.keys() != set(self.sums):
                raise SecateurError(
                    f"statistics: layer {layer} has {_listed(stats.sums)}, the first layer {_listed(self.sums)}"
                )

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of the sums that every layer has."""
        return tuple(next(iter(self.layers.values())).sums)

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
        return RouterStats(
            layers=self.layers | {layer: self.layers[layer].reordered(order) for layer, order in orders.items()}
        )

    def emptied(self) -> RouterStats:
        """Statistics of the same layers, experts and sums in which nothing was counted."""
        return RouterStats(
            layers={
                layer: LayerStats(
                    num_tokens=0,
                    token_count=torch.zeros_like(stats.token_count),
                    **{name: torch.zeros_like(value) for name, value in stats.sums.items()},
                )
                for layer, stats in self.layers.items()
            }
        )

    @classmethod
    def from_loads(cls, loads: Mapping[int, Sequence[int]], num_tokens: int) -> RouterStats:
        """`loads` is layer -> tokens of each expert; every layer saw `num_tokens` tokens."""
        return cls(layers={layer: _counted(layer, counts, num_tokens) for layer, counts in loads.items()})

    def loads(self) -> dict[int, list[int]]:
        """Layer -> tokens of each expert."""
        return {layer: stats.token_count.tolist() for layer, stats in self.layers.items()}

    def digest(self) -> str:
        """sha256 (hex) of the content: equal statistics have equal digests, on every machine."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        layers = {str(layer): stats.to_json() for layer, stats in self.layers.items()}
        return {"format": FORMAT, "version": self._version, "layers": layers}

    @property
    def _version(self) -> int:
        return 2 if self.sums else 1

    @classmethod
    def from_json(cls, data: Any) -> RouterStats:
        """The statistics that `to_json` wrote.

        Raises:
            SecateurError: another format or version, a missing or unknown entry, or an invalid count.
        """
        is_first = isinstance(data, dict) and data.get("version") == 1
        entries: Mapping[int, CountsEntry] = (
            as_record(data, CountsFile, "statistics") if is_first else as_record(data, SumsFile, "statistics")
        ).layers
        return cls(layers={layer: _as_stats(layer, entry) for layer, entry in entries.items()})

    def save(self, path: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Write the statistics as safetensors: `layers.N.num_tokens` (1,), and (E,) for all else, `layers.N.FIELD`.

        Args:
            about: JSON values that say what was counted; see `secateur.observation.observation`.
        """
        tensors: dict[str, Tensor] = {}
        for layer, stats in self.layers.items():
            tensors[f"layers.{layer}.token_count"] = stats.token_count
            tensors[f"layers.{layer}.num_tokens"] = torch.tensor([stats.num_tokens])
            tensors |= {f"layers.{layer}.{name}": value for name, value in stats.sums.items()}
        metadata = {"format": f"{FORMAT}/{self._version}"}
        if about is not None:
            metadata["about"] = json.dumps(about, sort_keys=True, allow_nan=False)
        atomic_write(Path(path), with_sorted_metadata(safetensors.torch.save(tensors, metadata=metadata)))

    @classmethod
    def load(cls, path: Path | str) -> RouterStats:
        """Read a statistics file.

        Raises:
            SecateurError: the file cannot be read or holds something else; the message names it.
        """
        return cls.load_with_about(path)[0]

    @classmethod
    def load_with_about(cls, path: Path | str) -> tuple[RouterStats, Any]:
        """Read a statistics file: (statistics, what `save` was given as `about`, None where there is nothing).

        Raises:
            SecateurError: see `load`.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return cls._from_tensors(metadata.get("format"), tensors), parse_json(
                metadata.get("about", "null"), "about"
            )
        except SecateurError as error:
            raise SecateurError(f"statistics file {path}: {error}") from error
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise SecateurError(f"statistics file {path}: cannot be read ({error})") from error

    @classmethod
    def _from_tensors(cls, found: str | None, tensors: Mapping[str, Tensor]) -> RouterStats:
        formats = {f"{FORMAT}/{version}": version for version in VERSIONS}
        if found not in formats:
            raise SecateurError(f"format is {found!r}, expected {_listed(formats)}")
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"layers\.([^.]+)\.([^.]+)", name)
            if match is None or match[2] not in VERSIONS[formats[found]]:
                raise SecateurError(f"unknown tensor {name}")
            is_one = match[2] == "num_tokens" and tensor.shape == (1,)
            parts.setdefault(match[1], {})[match[2]] = tensor.item() if is_one else tensor.tolist()
        return cls.from_json({"format": FORMAT, "version": formats[found], "layers": parts})


class CountsEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer in a file of version 1; what its entries must be together, `LayerStats` checks."""

    num_tokens: Count
    token_count: list[Count]


class SumsEntry(CountsEntry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer in a file of version 2."""

    weight_sum: list[float] | None = None
    norm_sum: list[float] | None = None
    norm_square_sum: list[float] | None = None
    weighted_norm_sum: list[float] | None = None
    max_activation: list[float] | None = None


class CountsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Statistics as JSON, version 1."""

    format: Literal["secateur-stats"]
    version: Literal[1]
    layers: dict[Layer, CountsEntry]


class SumsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Statistics as JSON, version 2."""

    format: Literal["secateur-stats"]
    version: Literal[1, 2]  # 1 is read as CountsFile; it is here for the message about another one
    layers: dict[Layer, SumsEntry]


def _as_stats(layer: int, entry: CountsEntry) -> LayerStats:
    lists = {name: getattr(entry, name, None) for name in SUMS}
    try:
        return LayerStats(
            num_tokens=entry.num_tokens,
            token_count=torch.tensor(entry.token_count, dtype=torch.int64),
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items() if values is not None},
        )
    except SecateurError as error:
        raise SecateurError(f"statistics, layer {layer}: {error}") from None


def _counted(layer: int, counts: Sequence[int], num_tokens: int) -> LayerStats:
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int):
            raise SecateurError(f"layer {layer}: a token count is {count!r}, expected an integer")
    try:
        return LayerStats(num_tokens=num_tokens, token_count=torch.tensor(counts, dtype=torch.int64))
    except (ValueError, OverflowError, RuntimeError) as error:
        raise SecateurError(f"layer {layer}: {error}") from None


def _checked_sum(name: str, value: Tensor, count: Tensor) -> Tensor:
    """`value` as a float64 copy on the CPU, when it is a sum over the routed tokens of each expert."""
    if not isinstance(value, Tensor) or value.shape != count.shape or value.dtype != torch.float64:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise SecateurError(f"{name} is {found}, expected float64 ({len(count)},)")
    value = value.detach().to("cpu", copy=True)
    for expert, (one, tokens) in enumerate(zip(value.tolist(), count.tolist(), strict=True)):
        if not math.isfinite(one) or (one < 0 and name not in SIGNED_SUMS):
            expected = "a finite number" if name in SIGNED_SUMS else "a finite number of 0 or more"
            raise SecateurError(f"{name} of expert {expert} is {one}, expected {expected}")
        if one and not tokens:
            raise SecateurError(f"{name} of expert {expert} is {one}, though no token reached it")
    return value


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "no sums"
