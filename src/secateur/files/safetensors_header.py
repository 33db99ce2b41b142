"""The header of a safetensors file, read without trust: every number in it is checked against the file."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.json import parse_json
from secateur.files.opened import opened

MAX_HEADER = 100_000_000  # bytes; the format's own limit
LENGTH = struct.Struct("<Q")  # of the header, in front of it

# bits of an entry, by the format's names of the types
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor in a file: its bytes are `length` from `start`, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file holds: its tensors in the order of their bytes, the texts beside them, and where the bytes begin."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        SecateurError: the file cannot be read, is truncated, is no such file, or its tensors overlap, leave gaps or do
            not fit.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH.size)
        length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
        return parse_header(start + file.read(min(length, MAX_HEADER)), size, path)


def parse_header(data: bytes, size: int, path: Path) -> Header:
    """The header that `data`, the first bytes of a file of `size` bytes, holds; `path` is for messages.

    Raises:
        SecateurError: see `read_header`.
    """
    try:
        (length,) = LENGTH.unpack(_exactly(data[: LENGTH.size], LENGTH.size))
        if length > MAX_HEADER:
            raise SecateurError(f"a header of {length} bytes, expected at most {MAX_HEADER}")
        header = parse_json(_exactly(data[LENGTH.size :], length), "its header")
        return _checked(header, LENGTH.size + length, size)
    except SecateurError as error:
        raise SecateurError(f"{path}: not a whole safetensors file ({error})") from error


def header_end(data: bytes) -> int:
    """Where the header of a file ends that begins with `data`, by its own word: not checked yet."""
    return LENGTH.size + LENGTH.unpack(data[: LENGTH.size])[0] if len(data) >= LENGTH.size else LENGTH.size


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands in front of tensors that follow each other without gaps, {name: (dtype, shape)} in their order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return _packed(header)


def with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with the texts of its header in order of their names; the library's order varies."""
    (length,) = LENGTH.unpack(data[: LENGTH.size])
    header = json.loads(data[LENGTH.size : LENGTH.size + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    return _packed(header) + data[LENGTH.size + length :]


def sort_metadata_in(path: Path) -> None:
    """The same in a file that has just been written, in its place: the header stays as long as it is."""
    with path.open("r+b") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise SecateurError(f"{path}: its header has {length} bytes, sorted it would have {len(text)}")
        file.seek(LENGTH.size)
        file.write(text + b" " * (length - len(text)))


def _packed(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH.size)  # tensors begin at a multiple of eight bytes
    return LENGTH.pack(len(text)) + text


def _checked(header: Any, data_start: int, size: int) -> Header:
    if not isinstance(header, dict):
        raise SecateurError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SecateurError("its __metadata__ is not an object of texts")
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)))
    end = data_start
    for name, entry in ordered.items():
        if entry.start != end:
            raise SecateurError(f"{name!r:.200} begins at byte {entry.start}, expected {end}, where another ends")
        end += entry.length
    if end != size:
        raise SecateurError(f"its tensors end at byte {end}, but the file has {size}; it is truncated or damaged")
    return Header(entries=ordered, metadata=metadata, data_start=data_start)


def _entry(name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise SecateurError(f"{name!r:.200}: found {value!r:.100}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], whole_numbers(value["shape"]), whole_numbers(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in BITS:
        raise SecateurError(f"{name!r:.200}: dtype {dtype!r:.40}, expected one of {', '.join(BITS)}")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        length = offsets[1] - offsets[0] if len(offsets) == 2 else 0
        raise SecateurError(f"{name!r:.200}: {length} bytes for shape {list(shape)} of {dtype}")
    return Entry(dtype=dtype, shape=shape, start=data_start + offsets[0], length=offsets[1] - offsets[0])


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A JSON list of sizes as a tuple; anything else is a SecateurError."""
    if not isinstance(values, list) or any(type(value) is not int or not 0 <= value < 2**48 for value in values):
        raise SecateurError(f"found {values!r:.60}, expected a list of whole numbers")
    return tuple(values)


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise SecateurError(f"it ends after {len(data)} of {length} bytes of its header")
    return data
