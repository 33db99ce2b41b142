"""What observing a model leaves behind: the statistics, which model they are of, and which data they were taken on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from secateur.decide.model_facts import ModelFacts
from secateur.errors import SecateurError
from secateur.files.records import as_record
from secateur.stats import RouterStats


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
        found = {layer: layer_stats.num_experts for layer, layer_stats in self.stats.layers.items()}
        if self.model is not None and found != dict(self.model.num_experts):
            raise SecateurError(f"statistics of experts {found}, expected those of the model: {self.model.num_experts}")

    def is_same(self, other: Observation) -> bool:
        """Whether both hold the same statistics of the same model and data."""
        return self.stats.digest() == other.stats.digest() and self.model == other.model and self.data == other.data

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
            origin = as_record(about, Origin, "about")
            model = None if origin.model is None else ModelFacts.from_json(origin.model)
            return cls(stats=stats, model=model, data=origin.data)
        except SecateurError as error:
            raise SecateurError(f"statistics file {path}: {error}") from error


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a statistics file says beside the statistics; of the model, `ModelFacts.from_json` checks it."""

    model: dict[str, Any] | None
    data: dict[str, Any]
