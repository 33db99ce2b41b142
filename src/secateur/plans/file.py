"""The files of a plan: JSON that people read and compare, and a file of tensors beside it for its arrays.

Version 1 has one source for each new expert and no side file. It is written wherever that is enough, so that other
software, and earlier releases, read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_json
from secateur.files.opened import opened
from secateur.files.records import Count, Expert, Experts, Finite, Layer, Name, Positive, as_record
from secateur.files.safetensors_header import Header, header_end, parse_header, read_header, with_sorted_metadata
from secateur.plans.arrays import Matrix, Neurons
from secateur.plans.layer import LayerPlan, Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION, VERSION_WITH_SOURCES = "secateur-plan", 1, 2
SIDE_FORMAT = "secateur-plan-arrays/1"
# A safetensors file by another name: vLLM takes every *.safetensors beside a config.json for weights.
SIDE, DIGITS = ".tensors", 16  # digits of the digest in its name
DTYPES = {"I32": "<i4", "F32": "<f4", "F64": "<f8"}
ONLY_IN_2 = ("rows", "weights")

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="a SHA-256 in hexadecimal digits")]


class LayerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer of a plan of version 1."""

    experts_before: Experts
    order: tuple[Expert, ...]


class PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan of version 1; what the entries must be together, `Plan` checks."""

    format: Literal["secateur-plan"]
    version: Literal[1]
    criterion: Name
    layers: dict[Layer, LayerEntry]
    details: dict[str, Any] = {}
    stats_digest: str | None = None
    removed: str | None = None


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An old expert in a new one; `neurons` is a row of the layer's tensor in the side file, left out for all."""

    expert: Expert
    weight: Finite
    neurons: Count | None = None


class SourcesEntry(LayerEntry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer of a plan of version 2; what it leaves out is as in version 1."""

    sources: dict[Expert, tuple[SourceEntry, ...]] = {}
    width_before: Positive | None = None
    solved: tuple[str, ...] = ()


class SourcesFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan of version 2."""

    format: Literal["secateur-plan"]
    version: Literal[1, 2]  # 1 is read as PlanFile; it is here for the message about another one
    criterion: Name
    layers: dict[Layer, SourcesEntry]
    details: dict[str, Any] = {}
    stats_digest: str | None = None
    removed: str | None = None
    rows: str = "representative"
    weights: str = "convex"
    side_sha256: Sha256 | None = None


def to_json(head: Mapping[str, Any], layers: Mapping[int, LayerPlan]) -> dict[str, Any]:
    """A plan as JSON.

    Args:
        head: what it says beside the layers, without what is as usual.
    """
    return _document(head, layers, _side(layers))


def _document(head: Mapping[str, Any], layers: Mapping[int, LayerPlan], side: bytes | None) -> dict[str, Any]:
    is_first = all(layer_plan.is_copy for layer_plan in layers.values()) and not (
        head.get("removed") == "mapped" or any(name in head for name in ONLY_IN_2)
    )
    return {
        "format": FORMAT,
        "version": VERSION if is_first else VERSION_WITH_SOURCES,
        **head,
        **({} if side is None else {"side_sha256": hashlib.sha256(side).hexdigest()}),
        "layers": {str(layer): _entry(layer_plan) for layer, layer_plan in layers.items()},
    }


def from_json(data: object, side: bytes | None) -> tuple[dict[str, Any], dict[int, LayerPlan]]:
    """What `Plan` is made of: all but the layers, by name, and the layers.

    Raises:
        SecateurError: another format or version, a missing or unknown entry, or a side file that does not fit.
    """
    if isinstance(data, dict) and data.get("version") == VERSION:
        first = as_record(data, PlanFile, "plan")
        layers = {
            layer: LayerPlan(experts_before=entry.experts_before, order=entry.order)
            for layer, entry in first.layers.items()
        }
        return _head(first, ("criterion", "details", "stats_digest", "removed")), layers
    second = as_record(data, SourcesFile, "plan")
    arrays = _unpacked(second.side_sha256, side)
    layers = {layer: _layer(layer, entry, arrays) for layer, entry in second.layers.items()}
    if arrays:
        raise SecateurError(f"plan: its side file has {sorted(arrays)!r:.200}, which no layer names")
    return _head(second, ("criterion", "details", "stats_digest", "removed", *ONLY_IN_2)), layers


def save(path: Path, head: Mapping[str, Any], layers: Mapping[int, LayerPlan]) -> None:
    """Write a plan as JSON, one line for each layer, and before it the side file if it has one.

    A side file has its digest in its name, so a plan that is written over stays whole until the new one is there; then
    its side file goes.

    Args:
        head: see `to_json`.

    Raises:
        SecateurError: something else lies where the side file goes.
        OSError: the disk refused; an old plan is as it was.
    """
    side = _side(layers)
    data = _document(head, layers, side)
    entries = data.pop("layers")
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    start = json.dumps(data, indent=2, allow_nan=False).removesuffix("\n}")
    old, new = _digest_in(path), data.get("side_sha256")
    if side is not None:
        beside = side_of(path, str(new))
        if beside.exists() and read_header(beside).metadata.get("format") != SIDE_FORMAT:
            raise SecateurError(f"{beside}: the arrays of the plan go there, but it is something else; take it away")
        atomic_write(beside, side)
    atomic_write(path, f'{start},\n  "layers": {{\n{lines}\n  }}\n}}\n')
    if old is not None and old != new:
        side_of(path, old).unlink(missing_ok=True)


def load(path: Path) -> tuple[Any, bytes | None]:
    """The JSON of a plan file, and the content of its side file if it names one; `from_json` compares the two.

    Raises:
        SecateurError: a file cannot be read; the message names it.
    """
    where = f"plan file {path}"
    data = read_json(path, where=where, constants=False)
    digest = data.get("side_sha256") if isinstance(data, dict) else None
    if digest is None or not is_digest(digest):  # a wrong one is refused with the rest
        return data, None
    beside = side_of(path.resolve(), digest)  # beside the file itself, not beside a link to it
    if not beside.exists() and not beside.is_symlink():
        raise SecateurError(f"{where}: its side file {beside.name} is missing, expected it beside the plan")
    with opened(beside, where=f"{where}: its side file {beside.name}") as file:
        return data, file.read()


def side_of(path: Path, digest: str) -> Path:
    """Where the arrays of a plan are: plan.json -> plan.DIGEST.tensors, beside it.

    No file says so: the name follows from the plan's and from the digest of what is in it.
    """
    return path.with_name(f"{path.stem}.{digest[:DIGITS]}{SIDE}")


def is_side_file(name: str, plan: str) -> bool:
    """Whether a file beside a plan of this name, such as plan.json, would be a side file of it."""
    return re.fullmatch(rf"{re.escape(Path(plan).stem)}\.[0-9a-f]{{{DIGITS}}}{re.escape(SIDE)}", name) is not None


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _digest_in(path: Path) -> str | None:
    """Of the side file of the plan that is there, if there is one."""
    try:
        data = read_json(path)
    except SecateurError:
        return None
    found = data.get("side_sha256") if isinstance(data, dict) else None
    return str(found) if is_digest(found) else None


def _head(record: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _entry(layer_plan: LayerPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {"experts_before": layer_plan.experts_before, "order": list(layer_plan.order)}
    if layer_plan.sources:
        row = {place: number for number, (place, _) in enumerate(_neurons(layer_plan))}
        entry["sources"] = {
            str(new): [
                {"expert": source.expert, "weight": source.weight}
                | ({} if source.neurons is None else {"neurons": row[new, at]})
                for at, source in enumerate(sources)
            ]
            for new, sources in layer_plan.sources.items()
        }
    if layer_plan.width_before is not None:
        entry["width_before"] = layer_plan.width_before
    if layer_plan.solved:
        entry["solved"] = list(layer_plan.solved)
    return entry


def _layer(layer: int, entry: SourcesEntry, arrays: dict[str, NDArray[Any]]) -> LayerPlan:
    """A layer; what it names is taken out of `arrays`."""
    where = f"plan, layer {layer}"
    named = Counter(
        source.neurons for sources in entry.sources.values() for source in sources if source.neurons is not None
    )
    rows = _taken(arrays, f"layers.{layer}.neurons", "I32", where) if named else None
    if rows is not None and len(rows) != named.total():
        raise SecateurError(f"{where}: neurons of shape {rows.shape}, expected {named.total()} lists of one length")
    if twice := [(row, times) for row, times in named.items() if times > 1]:
        raise SecateurError(
            f"{where}: {twice[0][1]} sources name list {twice[0][0]} of neurons, expected each list once"
        )
    try:
        sources = {
            new: tuple(
                Source(
                    expert=source.expert,
                    weight=source.weight,
                    neurons=None if source.neurons is None or rows is None else Neurons(rows[source.neurons]),
                )
                for source in sources
            )
            for new, sources in entry.sources.items()
        }
        solved = {name: Matrix(_taken(arrays, f"layers.{layer}.solved.{name}", "F", where)) for name in entry.solved}
    except IndexError as error:
        raise SecateurError(f"{where}: a source names a list of neurons that the side file does not have") from error
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}" if where not in str(error) else str(error)) from None
    return LayerPlan(
        experts_before=entry.experts_before,
        order=entry.order,
        sources=sources,
        width_before=entry.width_before,
        solved=solved,
    )


def _taken(arrays: dict[str, NDArray[Any]], name: str, dtype: str, where: str) -> NDArray[Any]:
    """The array of that name, which is no longer in `arrays`; dtype "F" is any floating one."""
    found = arrays.pop(name, None)
    if found is None:
        raise SecateurError(f"{where}: the side file has no {name}")
    if found.dtype.kind != {"I32": "i", "F": "f"}[dtype]:
        raise SecateurError(f"{where}: {name} is {found.dtype}, expected {'int32' if dtype == 'I32' else 'a float'}")
    return found


def _neurons(layer_plan: LayerPlan) -> Iterator[tuple[tuple[int, int], Neurons]]:
    """((new expert, place in its sources), neurons) of all sources that list them, in one order."""
    for new, sources in layer_plan.sources.items():
        for at, source in enumerate(sources):
            if source.neurons is not None:
                yield (new, at), source.neurons


def _arrays(layers: Mapping[int, LayerPlan]) -> dict[str, NDArray[Any]]:
    import numpy as np

    found: dict[str, NDArray[Any]] = {}
    for layer, layer_plan in layers.items():
        if lists := [neurons.array for _, neurons in _neurons(layer_plan)]:
            found[f"layers.{layer}.neurons"] = np.stack(lists)
        for name, matrix in layer_plan.solved.items():
            found[f"layers.{layer}.solved.{name}"] = matrix.array
    return found


def _side(layers: Mapping[int, LayerPlan]) -> bytes | None:
    """The content of the side file; None for a plan without arrays."""
    if all(layer_plan.is_copy for layer_plan in layers.values()):
        return None
    from safetensors.numpy import save as packed

    arrays = _arrays(layers)
    return with_sorted_metadata(packed(arrays, metadata={"format": SIDE_FORMAT})) if arrays else None


def _unpacked(digest: str | None, side: bytes | None) -> dict[str, NDArray[Any]]:
    if digest is None:
        return {}
    if side is None:
        raise SecateurError("plan: it lists neurons or solved matrices, whose side file is not at hand")
    if hashlib.sha256(side).hexdigest() != digest:
        raise SecateurError("plan: its side file is not the one that was written with it")
    header = parse_header(side[: header_end(side)], len(side), Path("the side file"))
    if header.metadata.get("format") != SIDE_FORMAT:
        raise SecateurError(f"the side file has format {header.metadata.get('format')!r:.60}, expected {SIDE_FORMAT!r}")
    return {name: _array(header, name, side) for name in header.entries}


def _array(header: Header, name: str, side: bytes) -> NDArray[Any]:
    import numpy as np

    entry = header.entries[name]
    if entry.dtype not in DTYPES:
        raise SecateurError(f"the side file: {name!r:.100} is {entry.dtype}, expected one of {', '.join(DTYPES)}")
    if len(entry.shape) != 2:
        raise SecateurError(f"the side file: {name!r:.100} has {len(entry.shape)} axes, expected 2")
    return np.frombuffer(side, DTYPES[entry.dtype], entry.length * 8 // _bits(entry.dtype), entry.start).reshape(
        entry.shape
    )


def _bits(dtype: str) -> int:
    return int(dtype[1:])
