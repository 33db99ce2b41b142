"""Options in parts: a part is a dataclass whose fields have the names that they have among the options."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

Part = TypeVar("Part")


def part_of(kind: type[Part], options: object) -> Part:
    """The `kind` of settings, taken from the options by the names of its fields."""
    dataclass: Any = kind
    part: Part = dataclass(**{option.name: getattr(options, option.name) for option in fields(dataclass)})
    return part
