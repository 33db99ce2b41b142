"""What a plan needs to know of a model: counts, sizes and what its routers need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from secateur.decide.limits import Limits, limits_of
from secateur.errors import SecateurError
from secateur.files.records import Experts, Layer, Positive, as_record


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
    top_k: Positive
    num_groups: Positive
    min_experts: Positive
    total_bytes: Positive
    has_one_count: bool
    num_experts: Mapping[Layer, Experts]
    bytes_per_expert: Mapping[Layer, Positive]

    def __post_init__(self) -> None:
        if self.num_experts.keys() != self.bytes_per_expert.keys():
            raise SecateurError(
                f"bytes_per_expert is of layers {sorted(self.bytes_per_expert)!r:.80}, "
                f"expected those of num_experts, {sorted(self.num_experts)!r:.80}"
            )

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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        by_layer = {name: value for name, value in values.items() if isinstance(value, Mapping)}
        return values | {name: {str(layer): n for layer, n in value.items()} for name, value in by_layer.items()}

    @classmethod
    def from_json(cls, data: Any) -> ModelFacts:
        """The facts that `to_json` wrote.

        Raises:
            SecateurError: a missing or unknown entry, or one of another kind; or layers that disagree.
        """
        return as_record(data, cls, "facts of a model")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model weighs: all of it, and {layer: bytes that go with one expert, its router row included}."""

    total_bytes: int
    bytes_per_expert: Mapping[int, int] = field(default_factory=dict)
