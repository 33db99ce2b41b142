"""A file that says what the entries of another engine's checkpoints are called (docs/engines.md has an example)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertAxis
from secateur.files.json import read_json
from secateur.files.records import Count, Positive, as_record
from secateur.training_checkpoint.names import NamedAxis, Naming, pattern_of


class AxisEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `NamedAxis`; rows: those of an expert, null where the name does not tell."""

    dim: Count = 0
    rows: Positive | None = ExpertAxis.rows_per_expert
    num_trailing: Count = ExpertAxis.num_trailing


class NamesFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of `Naming`, whose name is that of the file."""

    format: Literal["secateur-names"]
    version: Literal[1]
    blocks: tuple[str, ...]
    routers: dict[str, AxisEntry]
    experts: dict[str, AxisEntry]
    counters: tuple[str, ...] = Naming.counters
    whole: tuple[str, ...] = Naming.whole
    outside: tuple[str, ...] = Naming.outside
    optimizer: tuple[str, ...] = Naming.optimizer
    settings: tuple[str, ...] = Naming.settings

    def __post_init__(self) -> None:
        wanted = [(block, {"layer"}) for block in self.blocks]
        wanted += [(template, {"name", "key"}) for template in (*self.optimizer, *self.settings)]
        for template, needs in wanted:
            try:
                pattern_of(template)
            except re.error as error:
                raise SecateurError(f"{template!r}: {error}") from error
            found = set(re.findall(r"\{(\w+)\}", template)) - {"prefix"}
            if found != needs:
                raise SecateurError(f"{template!r} has the placeholders {sorted(found)}, expected {sorted(needs)}")


def read_naming(path: Path) -> Naming:
    """A naming from a JSON file: the fields of `Naming`, axes as `AxisEntry` objects.

    Raises:
        SecateurError: it cannot be read, or an entry is missing, unknown or of another type.
    """
    where = f"names file {path}"
    file = as_record(read_json(path, where=where), NamesFile, where)
    return Naming(
        name=path.name,
        blocks=file.blocks,
        routers={name: _axis(entry) for name, entry in file.routers.items()},
        experts={name: _axis(entry) for name, entry in file.experts.items()},
        counters=file.counters,
        whole=file.whole,
        outside=file.outside,
        optimizer=file.optimizer,
        settings=file.settings,
    )


def _axis(entry: AxisEntry) -> NamedAxis:
    axis = ExpertAxis(dim=entry.dim, rows_per_expert=entry.rows or 1, num_trailing=entry.num_trailing)
    return NamedAxis(axis=axis, rows_known=entry.rows is not None)
