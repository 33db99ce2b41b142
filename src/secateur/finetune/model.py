"""The model of a fine-tuning: loaded in float32 with what shall be trained, and written as it was found."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from secateur.checkpoint import run
from secateur.checkpoint.folder import CONFIG, INDEX, STATS, read_folder
from secateur.checkpoint.report import VERIFIED
from secateur.checkpoint.survey import Survey, survey
from secateur.data.images import Images
from secateur.errors import SecateurError
from secateur.files import atomic_write
from secateur.finetune.images import num_classes
from secateur.out_folder import copy_file

HEAD = "classifier"
# what says of a pruned folder that its bytes are those of its source, or was counted on the weights from before
STALE = {"report.json", "report.html", VERIFIED, STATS, "finetune.json"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """model: in float32. dtypes: what its tensors were on the disk, by name. head: the classes of a new one."""

    model: PreTrainedModel
    dtypes: dict[str, torch.dtype]
    head: tuple[str, ...] | None

    @property
    def num_parameters(self) -> int:
        return sum(one.numel() for one in self.model.parameters())

    @property
    def num_trained(self) -> int:
        return sum(one.numel() for one in self.model.parameters() if one.requires_grad)


def check_trainable(found: Survey) -> None:
    """Refuse what cannot be trained whole.

    Raises:
        SecateurError: a quantised model, or one with layers that predict further tokens.
    """
    if any(key in found.folder.config for key in ("quantization_config", "compression_config")):
        raise SecateurError(f"{found.folder.path}: it is quantised; fine-tune the model that it was made from")
    if found.mtp:
        raise SecateurError(
            f"{found.folder.path}: its layers that predict further tokens (MTP) are not trained and would be lost; "
            "take them out first (`secateur apply ... --mtp drop`)"
        )


def load(found: Survey, *, freeze: Sequence[str] = (), new_classes: Images | None = None) -> Loaded:
    """The model of a folder, ready to be trained.

    Args:
        freeze: regular expressions of the names of parameters that stay as they are.
        new_classes: replace the classifier by one of zeros for the classes of these.

    Raises:
        SecateurError: transformers does not load all of it, a pattern that fits no name, or nothing left to train.
    """
    model, problems = run.load(found.folder.path, found)
    if problems:
        raise SecateurError(f"{found.folder.path}: transformers does not load it whole: {problems}"[:500])
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    model.float()  # type: ignore[no-untyped-call]
    model.config.use_cache = False
    head = None if new_classes is None else _replace_head_(model, new_classes)
    for pattern in freeze:
        names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
        if not names:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise SecateurError(f"--freeze {pattern}: no parameter has such a name; names are like {some}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    loaded = Loaded(model=model, dtypes=dtypes, head=head)
    if not loaded.num_trained:
        raise SecateurError(f"--freeze {' '.join(freeze)}: no parameter is left to train")
    return loaded


def write(loaded: Loaded, found: Survey, folder: Path) -> None:
    """Write the model into a new folder, in the dtypes it had and with the files that lay beside it.

    config.json is the source's own, with other classes where there is a new head.

    Raises:
        SecateurError: what was written is not a model with the same experts. OSError: the disk refused.
    """
    model = loaded.model
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(loaded.dtypes.get(name, tensor.dtype))
    # not written here, and the source's own may be one that is refused
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for relative in kept_files(found):
        copy_file(found.folder.path / relative, folder / relative)
    if loaded.head is None:
        copy_file(found.folder.path / CONFIG, folder / CONFIG)
    else:
        atomic_write(folder / CONFIG, json.dumps(_with_classes(found, loaded.head), indent=2) + "\n")
    written = survey(read_folder(folder)).all_counts
    if written != found.all_counts:
        raise SecateurError(f"{folder}: experts {written} were written, expected {found.all_counts}")


def kept_files(found: Survey) -> list[PurePosixPath]:
    """What is carried along beside weights and config.json."""
    return [relative for relative in found.folder.others if str(relative) not in STALE]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those with decimals; a number that counts is of its type for good."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in every if tensor.is_floating_point()]


def _replace_head_(model: PreTrainedModel, classes: Images) -> tuple[str, ...]:
    old: Any = model.get_submodule(HEAD)
    number = num_classes(classes)
    new = nn.Linear(old.in_features, number)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    setattr(model, HEAD, new)
    model.config.num_labels = number
    return classes.classes or tuple(f"LABEL_{label}" for label in range(number))


def _with_classes(found: Survey, names: Sequence[str]) -> dict[str, Any]:
    config = {key: value for key, value in found.folder.config.items() if key != "num_labels"}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return config | labels
