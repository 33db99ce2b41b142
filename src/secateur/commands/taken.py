"""A group of options, out of the parameters of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


def taken_from(parameters: Mapping[str, Any], group: type[T]) -> T:
    """The group that a command's `locals()` hold: a field is the parameter of the same name.

    Raises:
        TypeError: a parameter is missing, which has no default in the group.
    """
    return group(**{field.name: parameters[field.name] for field in fields(group) if field.name in parameters})
