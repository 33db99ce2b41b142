"""How does the mixture get to the disk: in a work folder that a next start goes on from, then under its name?"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.digest import sha256_of
from secateur.files.dtypes import TORCH_DTYPES
from secateur.files.kept import Kept
from secateur.files.new_folder import copy_file
from secateur.files.progress import OnProgress, OnStage, counted, stage
from secateur.files.records import Count, as_record
from secateur.files.safetensors_header import read_header
from secateur.files.work_folder import Work
from secateur.model_folder.read.tensor_files import CONFIG, INDEX, StoredTensor
from secateur.model_folder.rewrite.pieces import NewTensor
from secateur.model_folder.rewrite.writer import Shard, index_of, into_shards, write_shard
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.neurons import divide, needs_text
from secateur.upcycling.options import Asked
from secateur.upcycling.origins import origins
from secateur.upcycling.parents import Parents
from secateur.upcycling.recipe import ROUTERS, Division
from secateur.upcycling.record import FORMAT, RECORD, VERSION
from secateur.upcycling.starts import STARTS
from secateur.version import __version__

SHARD = 4 * 10**9  # bytes of tensors in a file; a smaller model has one file
DIVISION = "division.json"  # in the work folder
METADATA = {"format": "pt"}
# Of the first parent's folder, what belongs to a model of the same tokens.
CARRIED = re.compile(
    r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|vocab[^/]*|merges\.txt|[^/]*\.model|chat_template[^/]*"
    r"|generation_config\.json|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*"
)


class Started(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a start was asked for; kept: SHA-256 of the files in the work folder that are finished."""

    parents: tuple[dict[str, Any], ...]
    options: dict[str, Any]
    kept: dict[str, str] = {}


class _Division(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    layers: dict[str, tuple[Count, ...]]


def digests(parents: Parents) -> list[dict[str, Any]]:
    """Of every parent its name and the SHA-256 of its model's files."""
    return [
        {
            "name": parent.path.resolve().name,
            "files": {name: sha256_of(parent.path / name) for name in parent.files.model_files},
        }
        for parent in parents.each
    ]


def prepared(
    parents: Parents, plan: Blueprint, asked: Asked, work: Work[Any], kept: Kept, on_progress: OnStage | None
) -> tuple[Division, Mapping[str, StoredTensor]]:
    """The division of neurons and the routers, from the work folder where an earlier start finished them."""
    from secateur.upcycling import running  # it needs transformers, which what is refused before does not

    texts: list[Any] = []

    def text() -> Any:
        if not texts:
            texts.append(running.sequences(parents, asked))
        return texts[0]

    noted = work.path / DIVISION
    if not kept.has(DIVISION):
        busy = None
        if needs_text(asked):
            busy = running.busy_neurons(parents, text()[0], stage("looking at neurons", on_progress))
        division = divide(parents, plan, asked, busy, stage("dividing", on_progress))
        atomic_write(noted, json.dumps({"layers": {str(layer): list(one) for layer, one in division.items()}}))
        kept.add(DIVISION)
    found = as_record(json.loads(noted.read_text()), _Division, str(noted))
    division = {int(layer): one for layer, one in found.layers.items()}
    if not kept.has(ROUTERS):
        kept.forget(ROUTERS)
        seen = None
        if STARTS[plan.start].targets is not None:
            on = stage("looking at layers", on_progress)
            seen = running.router_sums(parents, plan, division, text(), on)
        atomic_write(work.path / ROUTERS, save(_routers(parents, plan, asked, seen)))
        kept.add(ROUTERS)
    header = read_header(work.path / ROUTERS)
    return division, {
        name: StoredTensor(file=ROUTERS, dtype=one.dtype, shape=one.shape, start=one.start, length=one.length)
        for name, one in header.entries.items()
    }


def _routers(parents: Parents, plan: Blueprint, asked: Asked, seen: Mapping[Any, Any] | None) -> dict[str, Any]:
    import torch

    made = {}
    dtype = TORCH_DTYPES[parents.dtype]
    units = [source.unit for source in plan.experts]
    for layer in range(parents.layers):
        for name, sees in layout_of(plan).routers(plan, layer).items():
            if sees == "gate":
                made[name] = torch.zeros(1, parents.hidden, dtype=dtype)
                continue
            rows = STARTS[plan.start].rows(
                plan.units,
                parents.hidden,
                asked.router_std,
                zlib.crc32(f"{asked.seed} {name}".encode()),
                None if seen is None else seen[layer, sees],
            )
            if not bool(rows.isfinite().all()):
                raise SecateurError(f"--router {plan.start}: its rows for layer {layer} are not finite")
            made[name] = rows[units].to(dtype).contiguous()
    return made


def router_digests(work: Path, routers: Mapping[str, StoredTensor]) -> dict[str, str]:
    data = (work / ROUTERS).read_bytes()
    return {name: hashlib.sha256(data[one.start : one.start + one.length]).hexdigest() for name, one in routers.items()}


def write_shards(
    parents: Parents, tensors: Sequence[NewTensor], work: Work[Any], kept: Kept, on_bytes: OnProgress
) -> tuple[list[Shard], list[dict[str, Any]]]:
    """Write every file of weights that the work folder does not have yet; meanwhile the digests of the parents."""
    total = sum(tensor.length for tensor in tensors)
    shards = into_shards(tensors, SHARD if total > SHARD else None)
    on_chunk = counted(total, on_bytes)

    def source(file: str) -> Path:
        return work.path / file if file == ROUTERS else parents.source(file)

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(digests, parents)
        try:
            for shard in shards:
                if kept.has(shard.file):
                    on_chunk(sum(tensor.length for tensor in shard.tensors))
                    continue
                kept.forget(shard.file)
                (work.path / shard.file).unlink(missing_ok=True)
                write_shard(shard, source, work.path / shard.file, METADATA, on_chunk)
                kept.add(shard.file)
        finally:
            pool.shutdown(cancel_futures=True)
        return shards, told.result()


def fill(
    beside: Path,
    parents: Parents,
    plan: Blueprint,
    asked: Asked,
    tensors: Sequence[NewTensor],
    shards: Sequence[Shard],
    work: Work[Any],
    record: Mapping[str, Any],
    move: Callable[[Path, Path], None] = os.rename,
) -> None:
    """All but the report and the card into the new folder; the weights are moved there."""
    for shard in shards:
        move(work.path / shard.file, beside / shard.file)
    if len(shards) > 1:
        atomic_write(beside / INDEX, index_of(shards, {"total_size": sum(tensor.length for tensor in tensors)}))
    atomic_write(
        beside / CONFIG, json.dumps(layout_of(plan).config(parents, plan), indent=2, ensure_ascii=False) + "\n"
    )
    for name in carried(parents):
        copy_file(parents.first.path / name, beside / name)
    atomic_write(beside / RECORD, json.dumps(record, indent=1) + "\n")


def carried(parents: Parents) -> list[str]:
    """Files beside the weights that the result has too, of the first parent."""
    return [str(name) for name in parents.first.files.others if CARRIED.fullmatch(str(name))]


def record_of(
    made_of: Parents,
    parents: Sequence[Mapping[str, Any]],
    plan: Blueprint,
    options: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    routers: Mapping[str, str],
    division: Division,
) -> dict[str, Any]:
    """upcycle.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "secateur": __version__,
        "parents": list(parents),
        "options": dict(options),
        "target": plan.target.model_type,
        "tensors": origins(made_of, tensors),
        "routers": dict(routers),
        "division": {str(layer): list(one) for layer, one in division.items()},
    }
