"""What did the routers of a model do, layer by layer?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from secateur.errors import SecateurError
from secateur.files.records import Count, Layer, as_record
from secateur.stats.file import FORMAT, SHAPED, VERSIONS, digest_of, read_layers, version_of, write_layers
from secateur.stats.layer import LayerStats


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
        if self._version == SHAPED:
            return digest_of(self.layers)
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """JSON of counts and of the sums that version 2 knows.

        Raises:
            SecateurError: there are further sums, which are kept in files only.
        """
        if self._version == SHAPED:
            further = [name for name in self.sums if name not in VERSIONS[2]]
            raise SecateurError(f"statistics: {_listed(further)} have no JSON form; save them in a file")
        layers = {str(layer): stats.to_json() for layer, stats in self.layers.items()}
        return {"format": FORMAT, "version": self._version, "layers": layers}

    @property
    def _version(self) -> int:
        return version_of(self.sums)

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
        """Write the statistics as safetensors: `layers.N.num_tokens` (1,), `layers.N.token_count` (E,), `layers.N.SUM`.

        Args:
            about: JSON values that say what was counted; see `secateur.observation.observation`.
        """
        write_layers(Path(path), self.layers, about)

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
            layers, about = read_layers(Path(path))
            return cls(layers=layers), about
        except SecateurError as error:
            raise SecateurError(f"statistics file {path}: {error}") from error


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
    lists = {name: getattr(entry, name, None) for name in VERSIONS[2]}
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


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "no sums"
