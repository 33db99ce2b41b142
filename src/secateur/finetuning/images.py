"""Images for a classifier: what the data's classes are to the model, and batches of pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data.images import Images, Pixels8, read_images
from secateur.errors import SecateurError
from secateur.finetuning.settings import DataSettings, ModelSettings
from secateur.finetuning.task import Task
from secateur.model_folder.read.modality import class_names
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.models.vmoe.pixels import Pixels, read_pixels

SHIFT = 8  # images are moved by up to one part in so many of a side
EVAL_SEED = 0  # of the order of images that are measured: that of `eval` where nobody gives one
UNNAMED = re.compile(r"LABEL_\d+")


def image_task(folder: ModelFolder, data: DataSettings, model: ModelSettings) -> Task:
    """The images that `data` names, as the model's preprocessor_config.json wants them.

    Raises:
        SecateurError: no such images, or classes that are not the model's.
    """
    train = _read("--data", data.data)
    evaluation = _read("--eval-data", data.eval_data) if data.eval_data else None
    check_classes(train, folder, new_head=model.new_head)
    if evaluation is not None:
        if None not in (train.classes, evaluation.classes) and train.classes != evaluation.classes:
            raise SecateurError(f"--eval-data: classes {evaluation.classes}, expected those of --data, {train.classes}")
        evaluation.check_labels(train.num_classes if model.new_head else len(class_names(folder)))
    pixels = read_pixels(folder.files.path)
    items = ImageItems(train, augment_seed=data.seed if data.augment else None)
    return Task(
        unit="images",
        per_item=1,
        train=items,
        evaluation={} if evaluation is None else {"images": ImageItems(evaluation.draw(None, seed=EVAL_SEED))},
        about={"train": _about(train), "eval": {} if evaluation is None else _about(evaluation)},
        collate=lambda rows: collate(pixels, rows),
        set_epoch=items.set_epoch,
        together=folder.config.config.group_images or 1,
        images=train,
    )


class ImageItems(Dataset[dict[str, Any]]):
    """Image and label, {"image": uint8 (H, W, C), "label": int}; moved and flipped if there is a seed for it.

    How is decided by the seed, the epoch and the number of the image alone, so that a run that was killed goes on with
    the same images.
    """

    def __init__(self, images: Images, *, augment_seed: int | None = None) -> None:
        self._images, self._seed, self._epoch = images, augment_seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self._images.image(row)
        if self._seed is not None:
            image = augmented(image, np.random.default_rng([self._seed, self._epoch, row]))
        return {"image": image, "label": int(self._images.labels[row])}


def augmented(image: Pixels8, draw: np.random.Generator) -> Pixels8:
    """(H, W, C) moved by up to an eighth of each side, black where it was not, and flipped left to right or not."""
    height, width, _ = image.shape
    down, right = (int(draw.integers(-(side // SHIFT), side // SHIFT + 1)) for side in (height, width))
    moved = np.zeros_like(image)
    moved[max(down, 0) : height + down, max(right, 0) : width + right] = image[
        max(-down, 0) : height - down, max(-right, 0) : width - right
    ]
    return moved[:, ::-1] if draw.integers(2) else moved


def collate(pixels: Pixels, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The batch that the model takes."""
    return {
        "pixel_values": pixels([row["image"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def check_classes(images: Images, folder: ModelFolder, *, new_head: bool) -> None:
    """Refuse images whose classes are not those that the model knows, unless it gets a new head for them.

    Raises:
        SecateurError: another number of classes, or names in another order.
    """
    if new_head:
        return
    names, remedy = class_names(folder), "--new-head gives it a new classifier for these"
    if images.classes is not None and len(images.classes) != len(names):  # an .npz may have no example of the highest
        raise SecateurError(f"{images.name}: {images.num_classes} classes, the model knows {len(names)}; {remedy}")
    try:
        images.check_classes(names, folder.files.path)
    except SecateurError as error:
        raise SecateurError(f"{error}; {remedy}") from error
    known = [name for name in names if not UNNAMED.fullmatch(name)]
    if images.classes is not None and known and set(known).isdisjoint(images.classes):
        raise SecateurError(
            f"{images.name}: class 0 is {images.classes[0]!r}, the model calls it {names[0]!r}, and has none of these "
            f"names; {remedy}"
        )


def _read(flag: str, paths: Sequence[str]) -> Images:
    if len(paths) > 1:
        raise SecateurError(f"{flag}: {len(paths)} sets of images, expected one folder or .npz file")
    return read_images(Path(paths[0]).expanduser())


def _about(images: Images) -> dict[str, Any]:
    return {"images": {"images": len(images), "classes": images.num_classes, "digest": images.digest()}}
