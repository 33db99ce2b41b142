"""What a plan needs to know of a model: counts, sizes and what its routers need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.decide.limits import Limits, limits_of
from secateur.errors import SecateurError

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
        return limits_of(
            self.num_experts,
            num_groups=self.num_groups,
            least=self.min_experts,
            multiple_of=multiple_of,
            min_experts=min_experts,
        )

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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model weighs: all of it, and {layer: bytes that go with one expert, its router row included}."""

    total_bytes: int
    bytes_per_expert: Mapping[int, int] = field(default_factory=dict)
