"""The `.metadata` file of a torch.distributed.checkpoint folder, read without trusting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.files.limits import MAX_JSON
from secateur.files.opened import read_bytes
from secateur.training_checkpoint.stored import (
    Chunk,
    StoredBytes,
    StoredCheckpoint,
    StoredTensor,
    bytes_of,
    file_inside,
    whole_tensor,
)
from secateur.training_checkpoint.stubs import Stub, read_stubs

FILE = ".metadata"


def is_dcp_folder(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_dcp(folder: Path) -> StoredCheckpoint:
    """What a torch.distributed.checkpoint folder holds.

    Raises:
        SecateurError: `.metadata` is not such metadata, names a class beyond it, or does not fit the files beside it.
    """
    path = file_inside(folder, FILE)
    try:
        top = _fields(read_stubs(read_bytes(path, most=MAX_JSON)), "Metadata")
        places, files, parts = _places(folder, _typed(top.get("storage_data"), dict, "storage_data"))
        tensors: dict[str, StoredTensor] = {}
        blobs: dict[str, StoredBytes] = {}
        for name, entry in _typed(top.get("state_dict_metadata"), dict, "state_dict_metadata").items():
            _typed(name, str, "the name of an entry")
            if _is(entry, "BytesStorageMetadata"):
                blobs[name] = _place(places, name, None)
            else:
                tensors[name] = _tensor(name, _fields(entry, "TensorStorageMetadata"), places)
        paths = _paths(top.get("planner_data"), {*tensors, *blobs})
        _check_covered(parts)
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error
    if not tensors:
        raise SecateurError(f"{path}: it describes no tensor")
    # `places` is emptied by use: what is left is in a file but in no entry, and would be lost unseen.
    if places:
        raise SecateurError(f"{path}: it has data for {sorted({name for name, _ in places})[:3]}, which is no entry")
    return StoredCheckpoint(
        tensors=tensors, blobs=blobs, paths=paths, files=frozenset({*files, FILE}), described_in=FILE
    )


_Places = dict[tuple[str, tuple[int, ...] | None], list[StoredBytes]]


def _places(folder: Path, storage: dict[Any, Any]) -> tuple[_Places, set[str], list[StoredBytes]]:
    """(where every entry and chunk is, the files' names, all places)."""
    files: dict[str, Path] = {}
    places: _Places = {}
    for index, info in storage.items():
        key, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        name = _typed(key.get("fqn"), str, "the name of an entry")
        relative = _typed(where.get("relative_path"), str, f"{name}: relative_path")
        if where.get("transform_descriptors"):
            raise SecateurError(f"{name}: stored with {where['transform_descriptors']!r:.80}, expected plain bytes")
        path = files.get(relative) or files.setdefault(relative, file_inside(folder, relative))
        offset = None if key.get("offset") is None else _sizes(key["offset"], name)
        place = bytes_of(path, where.get("offset"), where.get("length"), name)
        places.setdefault((name, offset), []).append(place)
    every = [place for found in places.values() for place in found]
    return places, {PurePosixPath(relative).as_posix() for relative in files}, every


def _check_covered(places: Sequence[StoredBytes]) -> None:
    """Raises SecateurError: the pieces of a file are not all of it, each after the other, as they are written.

    Nothing else tells a wrong length of an opaque entry from the right one.
    """
    of_file: dict[Path, list[StoredBytes]] = {}
    for place in places:
        of_file.setdefault(place.path, []).append(place)
    for path, found in of_file.items():
        done, size = 0, path.stat().st_size
        for start, length in sorted((place.start, place.length) for place in found):
            if start != done:
                break
            done += length
        if done != size:
            raise SecateurError(
                f"the pieces of {path.name} that it names overlap or leave bytes out, from byte {done} on; expected "
                f"all {size}, one piece after the other"
            )


def _place(places: _Places, name: str, offset: tuple[int, ...] | None) -> StoredBytes:
    found = places.pop((name, offset), [])
    if len(found) != 1:
        raise SecateurError(f"{name}, chunk at {offset}: {len(found)} places in the files, expected one")
    return found[0]


def _tensor(name: str, entry: Mapping[str, Any], places: _Places) -> StoredTensor:
    properties = _typed(_stub(entry.get("properties"), "TensorProperties").state, tuple, f"{name}: properties")
    if len(properties) != 5:
        raise SecateurError(f"{name}: {len(properties)} tensor properties, expected 5")
    layout = _stub(properties[1], "_get_layout").args
    if layout != ("torch.strided",):
        raise SecateurError(f"{name}: layout is {layout!r:.60}, expected a dense tensor")
    chunks: list[Chunk] = []
    empty: set[tuple[int, ...]] = set()
    for chunk in _typed(entry.get("chunks"), list, f"{name}: chunks"):
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(part.get("offsets"), name), _sizes(part.get("sizes"), name)
        if 0 in sizes:
            empty.add(offsets)
        else:
            chunks.append(Chunk(offsets=offsets, sizes=sizes, place=_place(places, name, offsets), is_archive=True))
    for offsets in empty:  # ranks that hold nothing of it
        places.pop((name, offsets), None)
    return whole_tensor(name, _dtype(properties[0], name), _sizes(entry.get("size"), name), chunks, bool(properties[2]))


def _paths(data: object, names: set[str]) -> dict[str, tuple[Any, ...]] | None:
    """planner_data of DefaultSavePlanner: entry name -> keys of the nested state dict."""
    if data is None:
        return None
    for name, path in _typed(data, dict, "planner_data").items():
        if not isinstance(name, str) or not isinstance(path, tuple) or any(type(key) not in (str, int) for key in path):
            raise SecateurError(f"planner_data: {name!r:.80} has the path {path!r:.80}, expected names and numbers")
    if missing := names - set(data):  # type: ignore[call-overload]
        raise SecateurError(f"planner_data: no path for {sorted(missing)[:3]}")
    return {name: path for name, path in data.items() if name in names}  # type: ignore[attr-defined]


def _is(value: object, name: str) -> bool:
    return isinstance(value, Stub) and type(value).__name__ == name


def _stub(value: object, name: str) -> Stub:
    if not isinstance(value, Stub) or not _is(value, name):
        raise SecateurError(f"found {type(value).__name__} where {name} was expected")
    return value


def _fields(value: object, name: str) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = _typed(_stub(value, name).state, dict, f"the fields of {name}")
    return fields


def _typed(value: object, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise SecateurError(f"{what}: found {type(value).__name__}, expected {kind.__name__}")
    return value


def _sizes(value: object, name: str) -> tuple[int, ...]:
    args = _stub(value, "Size").args
    sizes = args[0] if len(args) == 1 else None
    if not isinstance(sizes, tuple) or any(type(size) is not int or not 0 <= size < 2**48 for size in sizes):
        raise SecateurError(f"{name}: a size of {args!r:.60}, expected whole numbers")
    return sizes


def _dtype(value: object, name: str) -> torch.dtype:
    kind = getattr(value, "kind", "")
    dtype = getattr(torch, kind.removeprefix("torch."), None) if isinstance(value, type) else None
    if not isinstance(dtype, torch.dtype):
        raise SecateurError(f"{name}: dtype is {kind or value!r:.60}, expected one of torch's")
    return dtype
