"""What a caller of a function may give where files, folders or numbers are expected."""

from __future__ import annotations

import functools
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any

from secateur.errors import SecateurError

# what a hint is made of -> (types that are taken for it, how messages call it)
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    NoneType: ((NoneType,), "None"),
}
StrPath = str | os.PathLike[str]
StrPaths = StrPath | Sequence[StrPath]  # one, or several


def as_texts(given: StrPaths | None) -> list[str]:
    """All that was given, as text; one path is not taken apart into its letters."""
    if given is None:
        return []
    return [os.fspath(given)] if isinstance(given, str | os.PathLike) else [os.fspath(path) for path in given]


def check_least(least: int, **options: float | None) -> None:
    """Refuse a number below `least`, by the option that it was given with; None is none.

    Raises:
        SecateurError: names the first one.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise SecateurError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def check_given(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse a number, a text or a flag of another type than a function's annotations say, and what is no path.

    Args:
        arguments: by name; those that the annotations say more of, such as mappings of numbers, are left alone.

    Raises:
        SecateurError: names the option of the first one.
    """
    for name, kinds in _path_hints(function).items():
        for given in _each(arguments[name]):
            if not _is_path_like(given, kinds):
                raise SecateurError(
                    f"--{name.replace('_', '-')}: found {given!r:.80}, expected the path of a file or folder"
                )
    for name, kinds in _plain_hints(function).items():
        value = arguments[name]
        if any(isinstance(value, KINDS[kind][0]) and (kind is bool or not isinstance(value, bool)) for kind in kinds):
            continue
        expected = " or ".join(KINDS[kind][1] for kind in kinds)
        raise SecateurError(f"--{name.replace('_', '-')}: found {value!r:.80}, expected {expected}")


@functools.cache
def _plain_hints(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """{parameter: what its annotation is made of}, where that is in KINDS alone."""
    hints = {name: hint for name, hint in typing.get_type_hints(function).items() if name != "return"}
    parts = {name: _parts(hint) for name, hint in hints.items()}
    return {name: kinds for name, kinds in parts.items() if all(kind in KINDS for kind in kinds)}


@functools.cache
def _path_hints(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """{parameter: the types that it may have beside paths}, where it may be a path."""
    hints = {name: _parts(hint) for name, hint in typing.get_type_hints(function).items() if name != "return"}
    return {
        name: tuple(typing.get_origin(part) or part for part in parts)
        for name, parts in hints.items()
        if os.PathLike[str] in parts
    }


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _each(given: Any) -> Iterator[Any]:
    yield from given if isinstance(given, list | tuple) else (given,)


def _is_path_like(given: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is one of these types; a path must be one that a file can have, and "" is the folder one is in."""
    if isinstance(given, str | os.PathLike):
        try:
            path = os.fspath(given)
        except TypeError:  # a result that was written to no file
            return isinstance(given, kinds)
        return isinstance(path, str) and path != "" and "\0" not in path
    return isinstance(given, kinds) and not isinstance(given, bytes | bytearray)
