"""The model of a fine-tuning: loaded in float32 with what shall be trained, and written as it was found."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.data.images import Images
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.files.atomic import atomic_write, fsync_file
from secateur.files.dtypes import torch_dtypes
from secateur.files.new_folder import copy_file
from secateur.files.refused import refused_by_the_disk
from secateur.files.safetensors_header import read_header, sort_metadata_in
from secateur.model_folder.read.load import load_whole
from secateur.model_folder.read.modality import modality_of
from secateur.model_folder.read.model_folder import LISTED, ModelFolder, understand
from secateur.model_folder.read.tensor_files import (
    CONFIG,
    FINETUNED,
    GROWN,
    INDEX,
    STATS,
    TensorFiles,
    read_tensor_files,
)
from secateur.model_folder.rewrite.report import REPORT, VERIFIED
from secateur.model_folder.rewrite.side_files import PAGE, TRAINING_STATE
from secateur.models.vmoe import VMoEForImageClassification

HEAD = "classifier"
LOGS = "runs"  # where transformers has TensorBoard write
DTYPES = torch_dtypes("F32 BF16 F16")  # that float32 holds without rounding
# what says of a pruned folder that its bytes are those of its source, or was counted on the weights from before
STALE = {REPORT, PAGE, VERIFIED, STATS, FINETUNED, GROWN}


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """model: in float32. head: the classes of a new one."""

    model: PreTrainedModel
    head: tuple[str, ...] | None

    @functools.cached_property
    def moe(self) -> MoEModel:
        """The description of the model, made when it is first asked for."""
        return describe_moe(self.model)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def check_trainable(folder: ModelFolder) -> None:
    """Refuse what cannot be trained whole.

    Raises:
        SecateurError: a quantised model, one with layers that predict further tokens, or one without a head.
    """
    model_class = folder.config.model_class
    images = modality_of(folder) == "images"
    if not (issubclass(model_class, VMoEForImageClassification) if images else model_class.can_generate()):
        raise SecateurError(
            f"{folder.files.path}: a {model_class.__name__} has no {'classifier' if images else 'language model head'} "
            "to train it by"
        )
    if folder.files.is_quantised:
        raise SecateurError(f"{folder.files.path}: it is quantised; fine-tune the model that it was made from")
    if folder.mtp:
        raise SecateurError(
            f"{folder.files.path}: its layers that predict further tokens (MTP) are not trained and would be lost; "
            "take them out first (`secateur apply ... --mtp drop`)"
        )


def load(folder: ModelFolder, *, freeze: Sequence[str] = (), new_classes: Images | None = None) -> Loaded:
    """The model of a folder, ready to be trained.

    Args:
        freeze: regular expressions of the names of parameters that stay as they are.
        new_classes: replace the classifier by one of zeros for the classes of these.

    Raises:
        SecateurError: transformers does not load all of it, or would not write all of it; a pattern that fits no name,
            or nothing left to train.
    """
    # in float32 whatever config.json says, so that no tensor is rounded
    model = load_whole(folder, torch.float32)
    _check_comes_back(model, folder)
    model.config.use_cache = False
    head = None if new_classes is None else _replace_head_(model, new_classes)
    for pattern in freeze:
        names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
        if not names:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise SecateurError(f"--freeze {pattern}: no parameter has such a name; names are like {some}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    loaded = Loaded(model=model, head=head)
    if not loaded.num_trained:
        raise SecateurError(f"--freeze {' '.join(freeze)}: no parameter is left to train")
    return loaded


def write(loaded: Loaded, model_folder: ModelFolder, folder: Path) -> None:
    """Write the model into a new folder: tensors in the files they were in and in the dtypes they had, and other files.

    config.json is the source's own, with other classes where there is a new head. The model is moved to the CPU.

    Raises:
        SecateurError: what was written is not the same model but for its numbers. OSError: the disk refused.
    """
    source = model_folder.files
    loaded.model.zero_grad()
    loaded.model.cpu()
    tensors = _as_stored(loaded.model)
    for file, header in source.headers.items():
        mine = {
            name: _as_before(tensors.pop(name), stored.dtype)
            for name, stored in source.tensors.items()
            if stored.file == file
        }
        with refused_by_the_disk(folder / file):
            save_file(mine, folder / file, metadata={"format": "pt"} | dict(header.metadata))
            sort_metadata_in(folder / file)
        fsync_file(folder / file)
    for relative in kept_files(model_folder):
        copy_file(source.path / relative, folder / relative)
    names = [CONFIG, INDEX] if source.index is not None else [CONFIG]
    if loaded.head is None:
        for name in names:
            copy_file(source.path / name, folder / name)
    else:
        atomic_write(folder / CONFIG, json.dumps(_with_classes(model_folder, loaded.head), indent=2) + "\n")
        if source.index is not None:
            atomic_write(folder / INDEX, json.dumps(_resized(source.index, folder, source.headers), indent=2) + "\n")
    _check_written(read_tensor_files(folder), model_folder, new_head=loaded.head is not None)


def kept_files(folder: ModelFolder) -> list[PurePosixPath]:
    """What is carried along beside weights and config.json; not the state of an earlier training run."""
    return [
        relative
        for relative in folder.files.others
        if str(relative) not in STALE and relative.parts[0] != LOGS and not re.fullmatch(TRAINING_STATE, str(relative))
    ]


def _as_stored(model: PreTrainedModel, device: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model by the names that they have in files."""
    tensors: dict[str, torch.Tensor] = model.state_dict()
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return stored


def _check_comes_back(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Refuse a folder of which something would be lost: transformers passes over some tensors without a word."""
    tensors = _as_stored(model, "meta")
    source = folder.files
    if lost := [name for name in source.tensors if name not in tensors]:
        raise SecateurError(
            f"{source.path}: {folder.config.model_class.__name__} does not load {len(lost)} of its tensors, which "
            f"would be lost: {', '.join(lost[:LISTED])}"
        )
    for name, stored in source.tensors.items():
        if tuple(tensors[name].shape) != stored.shape:
            raise SecateurError(
                f"{source.path}: {name} is {stored.shape}, but transformers would write {tuple(tensors[name].shape)}"
            )
        if tensors[name].is_floating_point() and stored.dtype not in DTYPES:
            raise SecateurError(f"{source.path}: {name} is {stored.dtype}, expected one of {', '.join(DTYPES)}")


def _as_before(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """In memory of its own, and where it has decimals in the dtype it had; a number that counts is of its type."""
    wanted = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(wanted, memory_format=torch.contiguous_format, copy=True)


def _resized(index: Mapping[str, Any], folder: Path, files: Iterable[str]) -> dict[str, Any]:
    total = sum(entry.length for file in files for entry in read_header(folder / file).entries.values())
    return {**index, "metadata": {"total_size": total}}


def _check_written(written: TensorFiles, source: ModelFolder, *, new_head: bool) -> None:
    def kinds(folder: TensorFiles) -> set[tuple[str, str, tuple[int, ...]]]:
        return {
            (name, tensor.dtype, () if new_head and name.startswith(f"{HEAD}.") else tensor.shape)
            for name, tensor in folder.tensors.items()
        }

    if differ := sorted(kinds(written) ^ kinds(source.files)):
        raise SecateurError(f"{written.path}: what was written differs from {source.files.path} in {differ[:LISTED]}")
    if (counts := understand(written).all_counts) != source.all_counts:
        raise SecateurError(f"{written.path}: experts {counts} were written, expected {source.all_counts}")


def _replace_head_(model: PreTrainedModel, classes: Images) -> tuple[str, ...]:
    old: Any = model.get_submodule(HEAD)
    number = classes.num_classes
    new = nn.Linear(old.in_features, number)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    setattr(model, HEAD, new)
    model.config.num_labels = number
    return classes.classes or tuple(f"LABEL_{label}" for label in range(number))


def _with_classes(folder: ModelFolder, names: Sequence[str]) -> dict[str, Any]:
    config = {key: value for key, value in folder.files.config.items() if key != "num_labels"}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return config | labels
