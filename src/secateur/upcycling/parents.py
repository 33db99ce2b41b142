"""Which dense models are the parents, and may they become one model? Only headers, configs and samples are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, foreign
from secateur.files.json import read_json
from secateur.model_folder.read.collector import collector_at_rest
from secateur.model_folder.read.names import Name, split
from secateur.model_folder.read.tensor_files import CONFIG, FLOATS, StoredTensor, TensorFiles, read_tensor_files
from secateur.model_folder.rewrite.computed import as_tensor
from secateur.upcycling.blocks import BLOCKS
from secateur.upcycling.targets import FFN, OUTSIDE, ROUTES, Target

MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Of a config, what two children of one seed may differ in: nothing of it is what a layer computes.
FREE = frozenset({
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range",
    "label2id", "max_position_embeddings", "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version",
    "use_cache", "_name_or_path", "chunk_size_feed_forward", "output_attentions", "output_hidden_states",
    "problem_type", "return_dict",
})  # fmt: skip
# Of files that earlier versions of transformers wrote: computed from the config, and nobody reads them.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
SAMPLE = 2**20  # bytes of a tensor that are compared
LEAST_COSINE = 0.5  # children of one seed have more than 0.9; independent models about 0
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A dense model. config: as transformers reads it, with all defaults."""

    files: TensorFiles
    config: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.files.path

    def file(self, tensor: StoredTensor, number: int) -> str:
        """How a piece names the file of a tensor of the parent with this number."""
        return f"{number}/{tensor.file}"


@dataclass(frozen=True, kw_only=True)
class Parents:
    """All parents, checked against each other. dtype: of all tensors. tokenizers: whether there were any to compare.

    far: the averaged tensor whose samples are least alike between a parent and the first, and their cosine.
    """

    each: tuple[Parent, ...]
    model_type: str
    dtype: str
    tokenizers: bool
    far: tuple[str, float] | None

    @property
    def first(self) -> Parent:
        return self.each[0]

    def __getitem__(self, key: str) -> int:
        return int(self.first.config[key])

    @property
    def layers(self) -> int:
        return self["num_hidden_layers"]

    @property
    def hidden(self) -> int:
        return self["hidden_size"]

    @property
    def width(self) -> int:
        return self["intermediate_size"]

    def source(self, file: str) -> Path:
        """The path of a file as `Parent.file` names it."""
        number, _, name = file.partition("/")
        return self.each[int(number)].path / name


def read_parents(paths: Sequence[Path], *, allow_unrelated: bool = False) -> Parents:
    """Read and compare the parents; the first is the seed.

    Raises:
        SecateurError: one is no dense model of a known type, is quantised or a mixture already, or two have other
            shapes, types, configs, tokenizers, or weights that are no children of one seed.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise SecateurError("a parent is listed twice; for several copies of one model use --form copy")
    each = [_read(path) for path in paths]
    first = each[0]
    for other in each[1:]:
        _compare_configs(first, other)
        _compare_tensors(first, other)
        _compare_tokenizers(first.path, other.path)
    dtypes = {tensor.dtype for tensor in first.files.tensors.values()}
    if len(dtypes) > 1:
        raise SecateurError(f"{first.path}: tensors of the types {', '.join(sorted(dtypes))}, expected one type")
    far = _farthest(each)
    if far is not None and far[1] < LEAST_COSINE and not allow_unrelated:
        raise SecateurError(
            f"{far[0]}: its weights in two parents have a cosine of {far[1]:.3f}, children of one seed have more than "
            f"{LEAST_COSINE}; the mean of unrelated weights computes nothing (--allow-unrelated takes it all the same)"
        )
    return Parents(
        each=tuple(each),
        model_type=str(first.config["model_type"]),
        dtype=dtypes.pop(),
        tokenizers=any((first.path / name).is_file() for name in TOKENIZERS),
        far=far,
    )


def check_target_takes(parents: Parents, target: Target) -> None:
    """Refuse what the target has no place for.

    Raises:
        SecateurError: names the tensor or the key.
    """
    dense = ROUTES[parents.model_type]
    for name in parents.first.files.tensors:
        parts = split(name)
        rest = name if parts is None else parts.rest
        if name in OUTSIDE or (parts and (rest in target.keeps or rest in FFN.values())):
            continue
        raise SecateurError(f"{parents.first.path}: a {target.model_type} model has no place for {name}")
    for key in dense.zero.get(target.model_type, ()):
        if parents.first.config.get(key):
            raise SecateurError(
                f"{parents.first.path / CONFIG}: {key} is {parents.first.config[key]!r:.40}, which a "
                f"{target.model_type} model has no place for"
            )


def _read(path: Path) -> Parent:
    files = read_tensor_files(path)
    weights = {name: tensor for name, tensor in files.tensors.items() if not name.endswith(BUFFERS)}
    files = dataclasses.replace(files, tensors=weights)
    kind = files.config.get("model_type")
    found = [key for key in MOE_KEYS if files.config.get(key)]
    experts = next((name for name in files.tensors if ".experts." in name), None)
    if found or experts:
        raise SecateurError(f"{path}: a mixture already ({found[0] if found else experts}), expected a dense model")
    if files.is_quantised:
        raise SecateurError(f"{path}: it is quantised ({files.quantisation}), expected plain weights")
    if kind not in BLOCKS:
        raise SecateurError(
            f"{path}: model type {kind!r:.60}: nothing is known that its layers could become; expected one of "
            f"{', '.join(BLOCKS)}"
        )
    for name, tensor in files.tensors.items():
        if tensor.dtype not in FLOATS:
            raise SecateurError(f"{path}: {name} has type {tensor.dtype}, expected one of {', '.join(FLOATS)}")
    parent = Parent(files=files, config=_config(path, str(kind), files))
    _check_layers(parent)
    return parent


def _config(path: Path, kind: str, files: TensorFiles) -> dict[str, Any]:
    with collector_at_rest():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    with foreign(f"{path / CONFIG}: transformers cannot read it"):
        config: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(files.config)).to_dict()
    return config


def _check_layers(parent: Parent) -> None:
    """Every layer has an FFN of the shapes that the config says."""
    hidden, width = parent.config["hidden_size"], parent.config["intermediate_size"]
    block = BLOCKS[parent.config["model_type"]]
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    for layer in range(parent.config["num_hidden_layers"]):
        for role, module in block.ffn.items():
            name = f"{block.layers}.{layer}.{module}.weight"
            found = parent.files.tensors.get(name)
            if found is None or found.shape != shapes[role]:
                was = "missing" if found is None else f"of shape {list(found.shape)}"
                raise SecateurError(f"{parent.path}: {name} is {was}, expected {list(shapes[role])} by {CONFIG}")


def _compare_configs(first: Parent, other: Parent) -> None:
    for key in {**first.config, **other.config}:
        one, two = first.config.get(key), other.config.get(key)
        if key not in FREE and one != two:
            raise SecateurError(
                f"{other.path / CONFIG}: {key} is {two!r:.100}, but {one!r:.100} in {first.path}; expected children of "
                "one model"
            )


def _compare_tensors(first: Parent, other: Parent) -> None:
    ours, theirs = first.files.tensors, other.files.tensors
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            where, lacks = (first.path, other.path) if name in ours else (other.path, first.path)
            tied = "; tied and untied embeddings cannot be mixed" if name == "lm_head.weight" else ""
            raise SecateurError(f"{lacks}: {name} is missing, which is in {where}{tied}")
        for what in ("shape", "dtype"):
            one, two = getattr(ours[name], what), getattr(theirs[name], what)
            if one != two:
                raise SecateurError(f"{other.path}: {name} has {what} {two}, but {one} in {first.path}")


def _compare_tokenizers(first: Path, other: Path) -> None:
    for name in TOKENIZERS:
        one, two = first / name, other / name
        if not one.is_file() or not two.is_file():
            continue
        same = one.read_bytes() == two.read_bytes()
        if not same and name.endswith(".json"):
            same = _vocabulary(one) == _vocabulary(two)
        if not same:
            raise SecateurError(f"{two}: another tokenizer than {one}; expected the same vocabulary in all parents")


def _vocabulary(path: Path) -> Any:
    found = read_json(path)
    return {key: found.get(key) for key in ("model", "added_tokens")} if "model" in found else found


def averaged_names(parent: Parent) -> list[str]:
    """Tensors that are no part of an FFN."""
    modules = tuple(f"{module}." for module in BLOCKS[parent.config["model_type"]].ffn.values())
    parts: dict[str, Name | None] = {name: split(name) for name in parent.files.tensors}
    return [name for name, one in parts.items() if one is None or not one.rest.startswith(modules)]


def _farthest(each: Sequence[Parent]) -> tuple[str, float] | None:
    """The averaged matrix with the smallest cosine between a parent and the first, by the beginning of both."""
    found = None
    for name in averaged_names(each[0]):
        if len(each[0].files.tensors[name].shape) < 2:
            continue  # of norms, all entries are near 1
        ours = _sample(each[0], name)
        for other in each[1:]:
            theirs = _sample(other, name)
            size = float(ours.norm() * theirs.norm())
            cosine = float(ours @ theirs) / size if size else 1.0
            if not math.isfinite(cosine):
                raise SecateurError(f"{other.path}: {name} holds values that are not finite, or {each[0].path} does")
            if found is None or cosine < found[1]:
                found = (name, cosine)
    return found


def _sample(parent: Parent, name: str) -> Any:
    tensor = parent.files.tensors[name]
    with (parent.path / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        return as_tensor(file.read(min(SAMPLE, tensor.length)), tensor.dtype).double()
