"""Keep what a pruning takes away, and put it back: pruned folder + undo folder = the source, byte for byte.

An undo folder holds the dropped experts as safetensors files under their old names, the headers of the source's files,
its small files that the pruning replaced, and undo.json, which says what belongs where, and the digest of every file of
the source. Version 1 of it had no digests of the files that were replaced, and none of itself (`seal`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.digest import sha256_of
from secateur.files.json import read_object
from secateur.files.new_folder import check_target, copy_file, written_beside
from secateur.files.opened import read_bytes
from secateur.files.progress import OnChunk, OnProgress, counted, silent
from secateur.files.records import Count, as_record
from secateur.files.safetensors_header import LENGTH, MAX_HEADER, Header, parse_header, read_header
from secateur.files.seen import Seen
from secateur.model_folder.read.model_folder import BY_FILES, ModelFolder, understand
from secateur.model_folder.read.tensor_files import CONFIG, INDEX, StoredTensor, TensorFiles, read_tensor_files
from secateur.model_folder.rewrite.pieces import Copy, NewTensor, dropped_tensors, kept_tensors
from secateur.model_folder.rewrite.target import Target
from secateur.model_folder.rewrite.writer import Shard, Writer
from secateur.plans import Plan
from secateur.surgery.fits import check_copies

RECORD, FORMAT, VERSION = "undo.json", "secateur-undo", 2
SEAL = "seal"
CHANGED = "it was changed after the pruning"
HEADERS, FILES = "headers", "files"


def holds_undo(path: Path) -> bool:
    return (path / RECORD).is_file()


def write_undo(
    folder: TensorFiles,
    plan: Plan,
    mtp: str | None,
    dropped: Sequence[Shard],
    side: Path,
    copied: Sequence[PurePosixPath],
    on_chunk: OnChunk,
    target: Target,
) -> None:
    """Fill the new folder `side`.

    Args:
        dropped: the files to write, with what the pruned folder lacks. copied: files that are the same there.
        target: takes the files.
    """
    for shard in dropped:
        target.shard(shard, lambda file: folder.path / file, side / shard.file, {"format": "pt"}, on_chunk)
    weights = {}
    for name, header in folder.headers.items():
        path = folder.path / name
        with path.open("rb") as file:
            target.text(side / HEADERS / name, file.read(header.data_start))
        weights[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    index = [] if folder.index is None else [PurePosixPath(INDEX)]
    replaced = [PurePosixPath(CONFIG), *index, *(name for name in folder.others if name not in copied)]
    for relative in replaced:
        target.copy(folder.path / relative, side / FILES / relative)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.to_json(),
        "mtp": mtp,
        "dropped": [shard.file for shard in dropped],
        "weights": weights,
        "replaced": {str(relative): sha256_of(folder.path / relative) for relative in replaced},
        "copied": {str(relative): sha256_of(folder.path / relative) for relative in copied},
    }
    record[SEAL] = _seal_of(record)
    target.text(side / RECORD, json.dumps(record, indent=2) + "\n")


def restore(pruned: Path, undo: Path, out: Path, *, on_bytes: OnProgress = silent) -> dict[str, Any]:
    """Write the source of a pruning anew from its two results.

    Args:
        on_bytes: called with (bytes written, bytes to write).

    Returns:
        {"files": names, "bytes": of the weights, "unchecked": names of the files whose digest no record has}.

    Raises:
        SecateurError: the folders do not belong together, one is damaged, or `out` is not free. What is written is
            compared with the source by its SHA-256 before it gets its name.
        OSError: the disk refused.
    """
    seen = Seen.of(path for path in sorted(undo.rglob("*")) if path.is_file())
    record, plan = read_record(undo)
    if _is_restored(out, record, undo):  # by a process that was killed afterwards
        sizes = {name: (undo / HEADERS / name).stat().st_size for name in record.weights}
        return _restored(record, sum(weights.bytes - sizes[name] for name, weights in record.weights.items()))
    for folder in (pruned, undo):
        check_target(folder, out)
    for name, digest in record.known.items():
        _check_there(undo / FILES / name)
        _check_digest(undo / FILES / name, digest, undo)
    source = understand(_source(record, undo), BY_FILES)  # a config.json that says others is its own affair
    found = read_tensor_files(pruned)
    parts = _parts(source, record, plan.filled(source.all_counts), found, undo)
    total = sum(part.now.length for of_file in parts.values() for part in of_file)
    on_chunk = counted(total, on_bytes)
    with written_beside(out) as beside:
        for name, weights in record.weights.items():
            with Writer(beside / name, Path, on_chunk) as writer:
                writer.put(read_bytes(undo / HEADERS / name, most=LENGTH.size + MAX_HEADER))
                for part in parts[name]:
                    writer.append(part.now)
            made_of = dict.fromkeys([str(undo / HEADERS / name), *(part.now.file for part in parts[name])])
            why = f"one of {', '.join(made_of)} was changed, or the folders do not belong together"
            _check_digest(beside / name, weights.sha256, undo, name, why)
        for name in record.replaced:
            copy_file(undo / FILES / name, beside / name)
        for name, digest in record.copied.items():
            _check_there(pruned / name)
            copy_file(pruned / name, beside / name)
            _check_digest(beside / name, digest, undo, pruned / name)
        _check_names(beside, record)
        seen.check()
        found.check_unchanged()
    return _restored(record, total)


def _check_names(folder: Path, record: UndoFile) -> None:
    """Nobody has taken a file away since it was written."""
    wanted = {*record.weights, *record.replaced, *record.copied}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(wanted - found):
        raise SecateurError(f"{folder}: {missing[0]} was taken away while the folder was written; start again")


def _restored(record: UndoFile, num_bytes: int) -> dict[str, Any]:
    files = [*record.weights, *record.replaced, *record.copied]
    return {
        "files": files,
        "bytes": num_bytes,
        "unchecked": [name for name in record.replaced if name not in record.known],
    }


def _is_restored(out: Path, record: UndoFile, undo: Path) -> bool:
    """Whether the folder holds the source already, byte for byte, and nothing else."""
    if not out.is_dir() or out.is_symlink():
        return False
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    if names != {*record.weights, *record.replaced, *record.copied}:
        return False
    digests = {name: weights.sha256 for name, weights in record.weights.items()} | record.copied
    digests |= {name: record.known.get(name) or sha256_of(undo / FILES / name) for name in record.replaced}
    return all(sha256_of(out / name) == digest for name, digest in digests.items())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Bytes that belong at `start` of a file of the source, and where they are now: `file` is a whole path."""

    start: int
    now: Copy


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the source's weights."""

    bytes: Count
    sha256: str


class UndoFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """undo.json. Names are of files: `dropped` lie in the undo folder, the others lay in the source.

    replaced, copied: with the digest of each; in version 1 `replaced` is a list of names. seal: the digest of the rest.
    """

    format: Literal["secateur-undo"]
    version: Literal[1, 2]
    plan: dict[str, Any]
    mtp: Literal["whole", "drop"] | None
    dropped: tuple[str, ...]
    weights: dict[str, Weights]
    replaced: dict[str, str] | tuple[str, ...]
    copied: dict[str, str]
    seal: str | None = None

    def __post_init__(self) -> None:
        if {isinstance(self.replaced, tuple), self.seal is None} != {self.version == 1}:
            raise SecateurError("version 1 lists names under 'replaced', later ones have a digest of each, and 'seal'")
        for name in (*self.dropped, *self.weights, *self.replaced, *self.copied):
            if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise SecateurError(f"it names the file {name!r:.100}, expected one inside the folder")

    @property
    def known(self) -> Mapping[str, str]:
        """The digests of the files that the pruning replaced, as far as they are known."""
        return {} if isinstance(self.replaced, tuple) else self.replaced


def read_record(undo: Path) -> tuple[UndoFile, Plan]:
    """What undo.json says, and the plan in it.

    Raises:
        SecateurError: no such file, something else in it, or not what was written into it.
    """
    where = str(undo / RECORD)
    content = read_object(undo / RECORD)
    record = as_record(content, UndoFile, where)
    if record.version > 1 and (found := _seal_of(content)) != record.seal:
        raise SecateurError(
            f"{where}: {SEAL!r} is {record.seal!r:.80}, but the rest has the SHA-256 {found}; {CHANGED}"
        )
    try:
        plan = Plan.from_json(record.plan)
        check_copies(plan)
        return record, plan
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error


def _seal_of(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _source(record: UndoFile, undo: Path) -> TensorFiles:
    """The source as its headers describe it; its tensors lie in files that are not there."""
    headers: dict[str, Header] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, weights in record.weights.items():
        path = undo / HEADERS / name
        headers[name] = parse_header(read_bytes(path, most=LENGTH.size + MAX_HEADER), weights.bytes, path)
        for tensor, entry in headers[name].entries.items():
            tensors[tensor] = StoredTensor(
                file=name, dtype=entry.dtype, shape=entry.shape, start=entry.start, length=entry.length
            )
    config = read_object(undo / FILES / CONFIG)
    return TensorFiles(path=undo, config=config, tensors=tensors, headers=headers, index=None, others=(), left_out=())


def _parts(
    source: ModelFolder, record: UndoFile, plan: Plan, pruned: TensorFiles, undo: Path
) -> dict[str, list[_Part]]:
    """The parts of every file of the source, in their order; together they are all of it."""
    left_out = source.mtp if record.mtp == "drop" else frozenset()
    taken = {name: undo / name for name in record.dropped}
    entries = {name: (path, entry) for path in taken.values() for name, entry in read_header(path).entries.items()}
    places = {name: (tensor.start, pruned.path / tensor.file, tensor) for name, tensor in pruned.tensors.items()}
    parts: dict[str, list[_Part]] = {name: [] for name in record.weights}
    for made in kept_tensors(source, plan, left_out):
        if made.name not in places:
            raise SecateurError(f"{pruned.path}: the tensor {made.name} is missing")
        start, path, tensor = places[made.name]
        _add(parts, made, path, start, tensor.length)
    for made in dropped_tensors(source, plan, left_out):
        if made.name not in entries:
            raise SecateurError(f"{undo}: the tensor {made.name} is missing")
        path, entry = entries[made.name]
        _add(parts, made, path, entry.start, entry.length)
    for of_file in parts.values():
        of_file.sort(key=lambda part: part.start)
    return parts


def _add(parts: dict[str, list[_Part]], made: NewTensor, path: Path, start: int, length: int) -> None:
    """Note where the copies in a written tensor came from; its other pieces are no bytes of the source."""
    if made.length != length:
        raise SecateurError(f"{path}: {made.name} has {length} bytes, expected {made.length}")
    for piece in made.pieces:
        if type(piece) is Copy and piece.length:
            now = Copy(file=str(path), start=start, length=piece.length)
            parts[piece.file].append(_Part(start=piece.start, now=now))
        start += piece.length


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise SecateurError(f"{path}: not there, expected a file of the source")


def _check_digest(path: Path, digest: str, undo: Path, name: object = None, why: str = CHANGED) -> None:
    """name: of the file in messages, where `path` is a copy of it."""
    found = sha256_of(path)
    if found != digest:
        raise SecateurError(f"{name or path}: SHA-256 {found}, expected {digest} by {undo / RECORD}; {why}")
