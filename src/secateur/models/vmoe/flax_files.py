"""Read the arrays of a checkpoint that the authors of V-MoE wrote with flax, without flax.

A checkpoint is `PREFIX.index` and `PREFIX.data-nnnnn-of-NNNNN`, all in msgpack with flax's extension types. The index
has the tree of parameter names, each with shape, type, and the slices it is cut into with the file of each; arrays in
the data files bear the number of their leaf in the tree, keys sorted. Files come from elsewhere, so every number in
them is checked before it is used, and nothing in them is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.opened import opened

VERSION = "20220622"
CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"  # says that a map holds chunks of arrays
ARRAY, SLICES, INDEX_INFO = 1, 6, 8  # extension types
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}  # JAX and torch agree
MAX_INDEX_BYTES = 64 * 2**20
MAX_ENTRIES = 2**15  # of one list or map
MAX_DEPTH, MAX_AXES, MAX_FILES = 32, 8, 10_000

Box = tuple[tuple[int, int], ...]  # (start, stop) of every axis


@dataclass(frozen=True, kw_only=True)
class Info:
    """An array by the index: its number in the data files, and the numbers of the files that have a part of it."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    files: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Some entries of an array as they lie in a file."""

    dtype: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an array: the slices it fills, and its entries."""

    box: Box
    flats: tuple[Flat, ...]


def read_arrays(prefix: Path, under: str) -> dict[str, Tensor]:
    """The arrays of a checkpoint whose names begin with `under` + "/", by the rest of the name; all where none does.

    A training state has its parameters under a name, what is published is the parameters alone.

    Args:
        prefix: path of the files without `.index`.

    Raises:
        SecateurError: a file is missing, damaged or of another version, or its numbers do not fit together; or there is
            no package msgpack.
    """
    infos, num_files = _read_index(prefix)
    wanted = {name.removeprefix(f"{under}/"): info for name, info in infos.items() if name.startswith(f"{under}/")}
    wanted = wanted or infos
    if not wanted:
        raise SecateurError(f"{prefix}.index: it names no array")
    needed = sorted({number for info in wanted.values() for number in info.files})
    files = [prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{num_files:05d}") for number in needed]
    _check_sizes(prefix, wanted, files)
    arrays = {name: torch.empty(info.shape, dtype=DTYPES[info.dtype]) for name, info in wanted.items()}
    filled = {name: torch.zeros(info.shape, dtype=torch.bool) for name, info in wanted.items()}
    for path in files:
        chunks = _read_data(path)
        for name, info in wanted.items():
            for piece in chunks.get(str(info.number), ()):
                _fill_(arrays[name], filled[name], info, piece, f"{path}: {name} of {prefix.name}.index")
    gaps = [name for name, done in filled.items() if not done.all()]
    if gaps:
        names = ", ".join(path.name for path in files)
        raise SecateurError(f"{prefix}.index: parts of {gaps[:5]} are in none of the data files ({names})")
    return arrays


def _read_index(prefix: Path) -> tuple[dict[str, Info], int]:
    path = prefix.with_name(f"{prefix.name}.index")
    if not path.is_file():
        raise SecateurError(f"{path}: no such file; expected the index of a V-MoE checkpoint")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise SecateurError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_INDEX_BYTES} in an index")
    found = _unpack(path, {INDEX_INFO: lambda data: data})
    version, num_files, tree = (found.get(key) for key in ("version", "shard_count", "index"))
    if version != VERSION:
        raise SecateurError(
            f"{path}: version {version!r:.40}, expected {VERSION!r}; an older index does not tell which array is which"
        )
    if type(num_files) is not int or not 1 <= num_files <= MAX_FILES or not isinstance(tree, dict):
        raise SecateurError(f"{path}: shard_count {num_files!r:.40}, expected 1 to {MAX_FILES}, and a tree of names")
    leaves = _leaves(path, tree)
    return {
        name: _info(f"{path}: {name}", number, data, num_files) for number, (name, data) in enumerate(leaves.items())
    }, num_files


def _leaves(path: Path, tree: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, bytes]:
    """{name: what the index says of it} in the order of the leaves' numbers; an entry without a value is none."""
    if depth > MAX_DEPTH:
        raise SecateurError(f"{path}: names of more than {MAX_DEPTH} parts")
    found: dict[str, bytes] = {}
    for key in sorted(tree):
        entry = tree[key]
        if isinstance(entry, dict):
            found |= _leaves(path, entry, f"{before}{key}/", depth + 1)
        elif isinstance(entry, bytes):
            found[f"{before}{key}"] = entry
        elif entry is not None:
            raise SecateurError(f"{path}: {before}{key} is a {type(entry).__name__}, expected what describes an array")
    return found


def _info(where: str, number: int, data: bytes, num_files: int) -> Info:
    described, slices, files = _list(where, data, 3)
    if not isinstance(described, bytes) or not isinstance(slices, list) or not isinstance(files, list):
        raise SecateurError(f"{where}: the description of the array is damaged")
    shape, dtype, *_ = _list(where, described, 4)
    if not isinstance(shape, list) or len(shape) > MAX_AXES or any(type(n) is not int or n < 1 for n in shape):
        raise SecateurError(f"{where}: shape {shape!r:.60}, expected at most {MAX_AXES} numbers above 0")
    if len(slices) != len(files) or any(type(n) is not int or not 0 <= n < num_files for n in files):
        raise SecateurError(f"{where}: files {files!r:.60}, expected one for each slice, 0 to {num_files - 1}")
    return Info(number=number, shape=tuple(shape), dtype=_text(where, dtype), files=frozenset(files))


def _check_sizes(prefix: Path, wanted: Mapping[str, Info], files: list[Path]) -> None:
    """Before memory is taken: arrays lie in the files as they are, so they cannot be larger."""
    for name, info in wanted.items():
        if info.dtype not in DTYPES:
            raise SecateurError(f"{prefix}.index: {name} is of type {info.dtype!r:.40}, expected {', '.join(DTYPES)}")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise SecateurError(f"{prefix}: the files {missing[:5]} are missing")
    claimed = sum(math.prod(info.shape) * DTYPES[info.dtype].itemsize for info in wanted.values())
    there = sum(path.stat().st_size for path in files)
    if claimed > there:
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        names = ", ".join(path.name for path in files[:5]) + more
        raise SecateurError(f"{prefix}.index: arrays of {claimed} bytes, but there are {there} in the files {names}")


def _read_data(path: Path) -> dict[str, list[Piece]]:
    """{number of an array: its pieces in this file}."""
    found = _unpack(path, {ARRAY: lambda data: _flat(str(path), data), SLICES: lambda data: _box(str(path), data)})
    if found.pop(CHUNKS_KEY, None) is not True:
        raise SecateurError(f"{path}: expected chunks of arrays, found a map of {sorted(found)[:5]}")
    odd = [number for number, pieces in found.items() if not isinstance(pieces, list)]
    if odd:
        raise SecateurError(f"{path}: array {odd[0]} is a {type(found[odd[0]]).__name__}, expected a list of pieces")
    return {number: [_piece(f"{path}: array {number}", piece) for piece in pieces] for number, pieces in found.items()}


def _piece(where: str, found: Any) -> Piece:
    flats, box = found if isinstance(found, list) and len(found) == 2 else (None, None)
    if isinstance(flats, list) and all(isinstance(flat, Flat) for flat in flats) and isinstance(box, tuple):
        return Piece(box=box, flats=tuple(flats))
    raise SecateurError(f"{where} is damaged, expected pieces and the slices they fill")


def _fill_(array: Tensor, filled: Tensor, info: Info, piece: Piece, where: str) -> None:
    box, flats = piece.box, piece.flats
    if len(box) != len(info.shape) or any(stop > size for (_, stop), size in zip(box, info.shape, strict=True)):
        raise SecateurError(f"{where}: slices {box}, expected some inside the shape {info.shape}")
    if {flat.dtype for flat in flats} != {info.dtype}:
        raise SecateurError(f"{where}: pieces of type {[flat.dtype for flat in flats][:5]}, expected {info.dtype}")
    data = b"".join(flat.data for flat in flats)
    shape = [stop - start for start, stop in box]
    if len(data) != math.prod(shape) * array.element_size():
        raise SecateurError(f"{where}: {len(data)} bytes for a part of shape {shape} in {info.dtype}")
    place = tuple(slice(start, stop) for start, stop in box)
    if filled[place].any():
        raise SecateurError(f"{where}: slices {box} are there twice")
    filled[place] = True
    array[place] = torch.frombuffer(bytearray(data), dtype=array.dtype).view(shape)


def _flat(where: str, data: bytes) -> Flat:
    shape, dtype, values = _list(where, data, 3)
    if not isinstance(shape, list) or not isinstance(values, bytes):
        raise SecateurError(f"{where}: an array without shape or bytes")
    return Flat(dtype=_text(where, dtype), data=values)


def _box(where: str, data: bytes) -> Box:
    box = []
    for one in _list(where, data):
        start, stop, step = _list(where, one, 3)
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop or step not in (None, 1):
            raise SecateurError(f"{where}: slice {(start, stop, step)!r:.60}, expected 0 <= start < stop in steps of 1")
        box.append((start, stop))
    return tuple(box)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, bytes) or len(value) > 40:
        raise SecateurError(f"{where}: {value!r:.40} for the name of a type")
    return value.decode("ascii", errors="replace")


def _list(where: str, data: Any, length: int | None = None) -> list[Any]:
    """A list that is packed once more inside a value."""
    import msgpack

    try:
        found = msgpack.unpackb(data, raw=True, max_array_len=MAX_ENTRIES, max_map_len=MAX_ENTRIES)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise SecateurError(f"{where}: damaged ({type(error).__name__}: {error})"[:300]) from error
    if not isinstance(found, list) or length not in (None, len(found)):
        raise SecateurError(f"{where}: {found!r:.60}, expected a list of {length or 'some'} entries")
    return found


def _unpack(path: Path, types: Mapping[int, Any]) -> dict[str, Any]:
    """The map that a file holds; extension types that are not asked for are left as they are."""
    try:
        import msgpack
    except ImportError as error:
        raise SecateurError("V-MoE checkpoints need the package msgpack: pip install secateur[vision]") from error
    with opened(path) as file:
        data = file.read()

    def extension(code: int, value: bytes) -> Any:
        return types[code](value) if code in types else msgpack.ExtType(code, value)

    try:
        found = msgpack.unpackb(
            data, ext_hook=extension, max_array_len=MAX_ENTRIES, max_map_len=MAX_ENTRIES, max_ext_len=len(data)
        )
    except SecateurError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise SecateurError(f"{path}: no msgpack, or damaged ({type(error).__name__}: {error})"[:300]) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SecateurError(f"{path}: a {type(found).__name__}, expected a map with names as keys")
    return found
