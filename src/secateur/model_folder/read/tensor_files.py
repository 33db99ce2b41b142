"""A Hugging Face model folder, read without trust: config.json, the index and the headers of its safetensors files."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.errors import SecateurError
from secateur.files.json import read_object
from secateur.files.safetensors_header import Header, read_header
from secateur.files.seen import Seen

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# What `secateur prune` leaves in its result; not beside config.json, where vLLM takes every *.safetensors for weights
# if there is no index.
STATS = "observed/stats.safetensors"
FINETUNED = "finetune.json"  # what `secateur finetune` says of it: of these weights, and no others
GROWN = "upcycle.json"  # likewise `secateur upcycle`
# Where a config.json says how weights are quantised; the last one is MLX's.
QUANTISATION = ("quantization_config", "compression_config", "quantization")
SCALES = ("_scale", "_scale_inv", "_scale_2")  # endings of scales, beside a quantised tensor of the name before it
PACKED = (".qweight", ".weight_packed", "_blocks")  # endings of quantised tensors that have another name then
FLOATS = ("F16", "BF16", "F32", "F64")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (*PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite", ".ot")
INDEX_OF_WEIGHTS = re.compile(r".\.index(\.\w+)?\.json$")  # of several files, in any form
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor on the disk: `length` bytes of `file`, a name in the folder, from `start`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """What a model folder holds.

    tensors: by name, in the order of the files and of the bytes in them. headers: of every file with weights of the
    model. index: the parsed index; None where the model is one file. others: files to carry along. left_out: files
    with weights in other forms, which nobody opens. seen: all the others as they were before they were read.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, Header]
    index: Mapping[str, Any] | None
    others: tuple[PurePosixPath, ...]
    left_out: tuple[PurePosixPath, ...]
    seen: Seen = field(default_factory=Seen, repr=False, compare=False)

    def check_unchanged(self, *, read: Collection[str] | None = None) -> None:
        """Compare the files with what they were before they were read.

        Args:
            read: names of the files that matter; all but those that are left out without it.

        Raises:
            SecateurError: one is gone, or is not the same.
        """
        self.seen.check(None if read is None else [self.path / name for name in read])

    @property
    def carried(self) -> tuple[str, ...]:
        """All files but those that are left out."""
        return (*self.model_files, *map(str, self.others))

    @property
    def model_files(self) -> tuple[str, ...]:
        """config.json, the index where there is one, and the files with weights."""
        return (CONFIG, *([] if self.index is None else [INDEX]), *self.headers)

    @property
    def config_digest(self) -> str:
        """sha256 (hex) of what config.json says."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        """By which the model is known to be the same, unchanged, as JSON."""
        files = {name: (self.path / name).stat() for name in self.headers}
        return {
            "path": str(self.path.resolve()),
            "config": self.config_digest,
            "files": {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()},
        }

    @functools.cached_property
    def quantisation(self) -> str | None:
        """How weights are quantised by config.json, "unnamed" where it does not say how; None where they are not.

        Where it says nothing, and the tensors show it, that is said.
        """
        for place, key in quantisations(self.config):
            settings = place[key]
            return str(settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings)
        shown = sorted({name.rpartition(".")[2] for name in self.tensors if self._is_of_quantised(name)})
        return f"by its tensors ({', '.join(shown[:3])}), of which config.json says nothing" if shown else None

    def _is_of_quantised(self, name: str) -> bool:
        """Whether a tensor is quantised, or the scale of one that is."""
        if name.endswith(PACKED):
            return self.tensors[name].dtype not in FLOATS
        beside = next((name.removesuffix(ending) for ending in SCALES if name.endswith(ending)), name)
        if name.endswith(".input_scale"):
            beside = f"{name.removesuffix('.input_scale')}.weight"
        return beside != name and beside in self.tensors and self.tensors[beside].dtype not in FLOATS

    @property
    def is_quantised(self) -> bool:
        return self.quantisation is not None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.length for tensor in self.tensors.values())


def quantisations(config: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """(place, key) of all that a config.json says of quantised weights, also in the config of its text model."""
    places = (config, config.get("text_config"))
    return [
        (one, key) for one in places if isinstance(one, Mapping) for key in QUANTISATION if one.get(key) is not None
    ]


def holds_model(folder: Path) -> bool:
    """True for a folder with a config.json and weights of a model, whatever their form."""
    names = [path.name for path in folder.iterdir()]
    return CONFIG in names and any(name == INDEX or Path(name).suffix in WEIGHTS for name in names)


def read_tensor_files(path: Path) -> TensorFiles:
    """Read and check a model folder.

    Raises:
        SecateurError: no config.json, no safetensors files or only pickled ones, a missing or truncated file, an index
            that disagrees with the files or leads out of the folder, a tensor that is there twice.
    """
    if not path.is_dir():
        raise SecateurError(f"{path}: not a folder, expected a model in Hugging Face's form")
    seen = Seen.of(path / name for name in (CONFIG, INDEX) if (path / name).is_file())
    config = read_object(path / CONFIG)
    index, listed, files = _weight_files(path)
    seen |= Seen.of(path / name for name in files)
    headers = {name: read_header(path / name) for name in files}
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            if name in tensors:
                raise SecateurError(f"{path}: the tensor {name} is in {tensors[name].file} and in {file}")
            tensors[name] = StoredTensor(
                file=file, dtype=entry.dtype, shape=entry.shape, start=entry.start, length=entry.length
            )
    if listed is not None:
        _check_index(path, listed, tensors)
    if not tensors:
        raise SecateurError(f"{path}: its safetensors files hold no tensor")
    others, left_out = _other_files(path, files)
    return TensorFiles(
        path=path,
        config=config,
        tensors=tensors,
        headers=headers,
        index=index,
        others=others,
        left_out=left_out,
        seen=seen | Seen.of(path / relative for relative in others),
    )


def _weight_files(path: Path) -> tuple[dict[str, Any] | None, dict[str, str] | None, list[str]]:
    """(index, tensor -> file by the index, files): of a model in several files, or (None, None, one file)."""
    names = sorted(entry.name for entry in path.iterdir())
    shards = [name for name in names if SHARD.fullmatch(name)]
    if INDEX in names:
        index = read_object(path / INDEX)
        listed = _weight_map(path, index)
        files = sorted(set(listed.values()))
        unlisted = sorted({*shards, *({SINGLE} & set(names))} - set(files))
        if unlisted:
            raise SecateurError(f"{path}: {unlisted[0]} is not in {INDEX}; expected one model in the folder")
        for name in files:
            if not (path / name).is_file():
                raise SecateurError(f"{path}: the file {name}, named in {INDEX}, is missing")
        return index, listed, files
    if SINGLE in names and not shards:
        return None, None, [SINGLE]
    if shards:
        raise SecateurError(f"{path}: {shards[0]} but no {INDEX}; the list of its files is missing")
    pickled = [name for name in names if Path(name).suffix in PICKLED]
    how = "load the model with transformers, and save_pretrained writes safetensors"
    found = f"found {pickled[0]}, and pickled files are never opened; {how}" if pickled else f"found {names[:5]}"
    raise SecateurError(f"{path}: expected {INDEX} or {SINGLE}; {found}")


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SecateurError(f"{path / INDEX}: weight_map is {listed!r:.60}, expected tensor names and their files")
    for name, file in listed.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set("/\\\0") & set(file)
        if not plain or not file.isprintable():
            raise SecateurError(f"{path / INDEX}: {name!r:.100} is in {file!r:.100}, expected a file beside the index")
    return dict(listed)


def _check_index(path: Path, listed: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name in listed.keys() | tensors.keys():
        by_index, found = listed.get(name), tensors[name].file if name in tensors else None
        if by_index != found:
            raise SecateurError(
                f"{path}: {name!r:.200} is in {by_index or 'no file'} by {INDEX}, but was found in {found or 'none'}"
            )


def _other_files(path: Path, weights: list[str]) -> tuple[tuple[PurePosixPath, ...], tuple[PurePosixPath, ...]]:
    """(to carry along, to leave out); folders whose name begins with a dot are nobody's."""
    others: list[PurePosixPath] = []
    left_out: list[PurePosixPath] = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*names, *linked]:
            relative = PurePosixPath((Path(folder) / name).relative_to(path).as_posix())
            if str(relative) in weights or str(relative) in (INDEX, CONFIG):
                continue
            if not (path / relative).is_file():
                raise SecateurError(f"{path / relative}: not a regular file, or a link to nothing")
            is_weight = relative.suffix in WEIGHTS or INDEX_OF_WEIGHTS.search(name) is not None
            is_weight = is_weight and str(relative) != STATS
            (left_out if is_weight else others).append(relative)
    return tuple(sorted(others)), tuple(sorted(left_out))
