"""A record is described once, as a type; msgspec converts it, and an error names file, field, found and expected.

A type is a msgspec.Struct or a dataclass whose fields are annotated, with the ranges and words of this module or with
`Meta(..., description="what is expected, in words")` of their own. A Struct says itself whether other keys are errors
(`forbid_unknown_fields`); of a dataclass that is asked for they are, of one inside it they are not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from secateur.errors import SecateurError
from secateur.files.limits import MAX_COUNT, MAX_EXPERTS, MAX_FLOAT, MAX_LAYER, SHOWN

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT, description="a whole number of at least 0")]
Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT, description="a whole number above 0")]
Layer = Annotated[int, Meta(ge=0, le=MAX_LAYER, description=f"a layer id, a whole number up to {MAX_LAYER}")]
Expert = Annotated[int, Meta(ge=0, lt=MAX_EXPERTS, description=f"an expert id, a whole number below {MAX_EXPERTS}")]
Experts = Annotated[int, Meta(ge=1, le=MAX_EXPERTS, description=f"a number of experts from 1 to {MAX_EXPERTS}")]
Finite = Annotated[float, Meta(ge=-MAX_FLOAT, le=MAX_FLOAT, description="a finite number")]
Name = Annotated[str, Meta(min_length=1, description="a text that is not empty")]

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
}


def as_record(data: Any, kind: type[T], where: str) -> T:
    """`data`, which came out of JSON, as a value of the type `kind`; keys of objects become whole numbers where asked.

    Args:
        where: the name of the data in messages, such as its file.

    Raises:
        SecateurError: something is missing, unknown, of another type or out of range, or `kind` itself refuses it.
    """
    try:
        if isinstance(data, dict) and dataclasses.is_dataclass(kind) and data.keys() - _fields(kind).keys():
            raise SecateurError("unknown keys")
        record: T = _converted(data, kind)
        return record
    except (ValueError, RecursionError) as error:  # of msgspec, of `kind` itself, of keys that are no text
        raise SecateurError(f"{where}: {_fault(data, kind, '', error)}") from error


def _converted(data: Any, kind: Any) -> Any:
    return msgspec.convert(data, kind, strict=True, str_keys=True)


def _refusal(data: Any, kind: Any) -> Exception | None:
    try:
        _converted(data, kind)
    except (ValueError, RecursionError) as error:
        return error
    return None


def _fault(value: Any, kind: Any, path: str, error: Exception) -> str:
    """What is wrong with `value`, in words: the innermost part of it that its type refuses, and why."""
    if isinstance(value, dict) and get_origin(_bare(kind)) in (dict, Mapping):
        of_keys = get_args(_bare(kind))[0]
        for key in value:
            if _refusal({key: None}, dict[of_keys, Any]):  # type: ignore[valid-type]
                return f"{_at(path, 'has')} the key {key!r:.{SHOWN}}, expected {_words(of_keys)}"
    for step, part, inner in _parts(value, kind):
        if refusal := _refusal(part, inner):
            return _fault(part, inner, path + step, refusal)
    fields = _fields(kind)
    if not isinstance(value, dict) or not fields:
        return f"{_at(path, 'is')} {value!r:.{SHOWN}}, expected {_words(kind)}"
    if missing := [key for key, (_, is_required) in fields.items() if is_required and key not in value]:
        return f"{_at(f'{path}.{missing[0]}', 'is missing')}, found {sorted(value)!r:.200}"
    if error.__cause__ is None and (unknown := sorted(value.keys() - fields.keys())):
        return f"{_at(f'{path}.{unknown[0]}', 'is unknown')}, expected {', '.join(fields)}"
    return f"{_at(path, 'is refused: ') if path else ''}{error.__cause__ or error}"  # by the type's own check


def _at(path: str, verb: str) -> str:
    return f"{path.removeprefix('.')!r:.200} {verb}" if path else "found"


def _parts(value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """(step of the path, part, its type) of the parts of an object or a list, as far as `kind` tells their types."""
    bare = _bare(kind)
    origin, inner, fields = get_origin(bare), get_args(bare), _fields(kind)
    if origin in (Union, UnionType):
        for one in inner:
            if _is_like(value, one):
                yield "", value, one
    elif isinstance(value, dict) and fields:
        yield from ((f".{key}", value[key], field) for key, (field, _) in fields.items() if key in value)
    elif isinstance(value, dict) and origin in (dict, Mapping):
        yield from ((f".{key}", part, inner[1]) for key, part in value.items())
    elif isinstance(value, list) and origin in (list, tuple):
        kinds = inner if origin is tuple and ... not in inner else [inner[0]] * len(value)
        yield from ((f"[{index}]", part, one) for index, (part, one) in enumerate(zip(value, kinds, strict=False)))


def _is_like(value: Any, kind: Any) -> bool:
    """True for an object or a list where `kind` is one too, whatever is in it."""
    origin = get_origin(_bare(kind)) or _bare(kind)
    if isinstance(value, dict):
        return bool(_fields(kind)) or origin in (dict, Mapping)
    return isinstance(value, list) and origin in (list, tuple)


def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """(type, is it required) of each field of a record; empty for other types."""
    bare = _bare(kind)
    return _fields_of(bare) if isinstance(bare, type) else {}


@functools.cache
def _fields_of(kind: type) -> dict[str, tuple[Any, bool]]:
    if not issubclass(kind, msgspec.Struct) and not dataclasses.is_dataclass(kind):
        return {}
    hints = get_type_hints(kind, include_extras=True)
    if issubclass(kind, msgspec.Struct):
        return {field.encode_name: (hints[field.name], field.required) for field in msgspec.structs.fields(kind)}
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    }


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _words(kind: Any) -> str:
    """What a type expects."""
    bare = _bare(kind)
    said = [one.description for one in get_args(kind)[1:] if isinstance(one, Meta)] if bare is not kind else []
    if said and said[0]:
        return said[0]
    origin, inner = get_origin(bare), get_args(bare)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin in (list, tuple):
        return f"a list of {len(inner)}" if origin is tuple and ... not in inner else "a list"
    return WORDS.get(bare, "an object")
