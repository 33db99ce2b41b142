"""What observing a model leaves behind: the statistics, which model they are of, and which data they were taken on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.allocate import LayerLimits, Limits
from secateur.errors import SecateurError
from secateur.keep import Sizes
from secateur.stats import RouterStats

NUMBERS = ("top_k", "num_groups", "min_experts", "total_bytes")
TEXTS = ("model_type", "digest")
FLAG = "has_one_count"
BY_LAYER = ("num_experts", "bytes_per_expert")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a plan needs to know of a model.

    Args:
        digest: sha256 (hex) of its kind and of the shapes of its routers; variants of a model have the same.
        has_one_count: whether all layers must keep the same number of experts.
        num_experts: {MoE layer: E}. bytes_per_expert: {the same: bytes that go with an expert, router row included}.
        top_k, num_groups, min_experts: of its routers, see `MoEModel`. total_bytes: of all tensors.
    """

    model_type: str
    digest: str
    top_k: int
    num_groups: int
    min_experts: int
    total_bytes: int
    has_one_count: bool
    num_experts: Mapping[int, int]
    bytes_per_expert: Mapping[int, int]

    @property
    def sizes(self) -> Sizes:
        return Sizes(total_bytes=self.total_bytes, bytes_per_expert=self.bytes_per_expert)

    def limits(self, *, multiple_of: int = 1, min_experts: int = 1) -> Limits:
        """Admissible expert counts a layer: never fewer than the router's top-k and groups need."""
        return {
            layer: LayerLimits(
                num_experts=experts,
                multiple_of=multiple_of,
                min_experts=max(self.min_experts, min_experts, multiple_of),
                num_groups=self.num_groups,
            )
            for layer, experts in self.num_experts.items()
        }

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in (*TEXTS, *NUMBERS, FLAG)}
        return plain | {name: {str(layer): n for layer, n in getattr(self, name).items()} for name in BY_LAYER}

    @classmethod
    def from_json(cls, data: Any) -> ModelFacts:
        """The facts that `to_json` wrote.

        Raises:
            SecateurError: a missing or unknown entry, or one of another kind; or layers that disagree.
        """
        names = {*TEXTS, *NUMBERS, FLAG, *BY_LAYER}
        if not isinstance(data, dict) or data.keys() != names:
            raise SecateurError(f"facts of a model: found {data!r:.80}, expected {', '.join(sorted(names))}")
        wrong = [name for name in TEXTS if not isinstance(data[name], str)]
        wrong += [name for name in NUMBERS if not _is_count(data[name])]
        wrong += [FLAG] * (not isinstance(data[FLAG], bool))
        wrong += [name for name in BY_LAYER if not _is_by_layer(data[name])]
        if wrong or data["num_experts"].keys() != data["bytes_per_expert"].keys():
            name = wrong[0] if wrong else "bytes_per_expert"
            raise SecateurError(f"facts of a model: {name} is {data[name]!r:.80}, expected {_expected(name)}")
        by_layer = {name: {int(layer): count for layer, count in data[name].items()} for name in BY_LAYER}
        return cls(**{**data, **by_layer})


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Statistics with their origin.

    Args:
        stats: of MoE layers of `model`. model: None for statistics that come without, such as those of a training run.
        data: JSON values: what the model was run on (sources, digests, seed, tokens), and with which versions.
    """

    stats: RouterStats
    model: ModelFacts | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {layer: one.num_experts for layer, one in self.stats.layers.items()}
        if self.model is not None and found != dict(self.model.num_experts):
            raise SecateurError(f"statistics of experts {found}, expected those of the model: {self.model.num_experts}")

    def save(self, path: Path | str) -> None:
        """Write a statistics file that also says all this."""
        self.stats.save(path, {"model": self.model.to_json() if self.model else None, "data": dict(self.data)})

    @classmethod
    def load(cls, path: Path | str) -> Observation:
        """Read a statistics file, with or without an origin.

        Raises:
            SecateurError: the file cannot be read or holds something else; the message names it.
        """
        stats, about = RouterStats.load_with_about(path)
        if about is None:
            return cls(stats=stats)
        try:
            if not isinstance(about, dict) or about.keys() != {"model", "data"} or not isinstance(about["data"], dict):
                raise SecateurError(f"found {about!r:.80}, expected model and data")
            model = None if about["model"] is None else ModelFacts.from_json(about["model"])
            return cls(stats=stats, model=model, data=about["data"])
        except SecateurError as error:
            raise SecateurError(f"statistics file {path}: {error}") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_by_layer(value: Any) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("0|[1-9][0-9]*", layer) and _is_count(count) for layer, count in value.items()
    )


def _expected(name: str) -> str:
    if name in BY_LAYER:
        return "layers and whole numbers above 0, the same layers in both"
    if name == FLAG:
        return "true or false"
    return "a text" if name in TEXTS else "a whole number above 0"
