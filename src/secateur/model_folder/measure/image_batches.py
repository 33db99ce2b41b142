"""The images that a model folder is run on: which of a set, and how many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.images import Images, read_images
from secateur.errors import SecateurError
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.models.vmoe.pixels import Pixels, read_pixels

BATCH = 64  # images, where nothing else is asked for
MOST = 10_000  # that a model is observed on, where nothing else is asked for


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledImages:
    """Images in the order in which a model takes them, and what is written down of them, as JSON."""

    images: Images
    about: dict[str, Any]


def draw(specs: Sequence[str], samples: int | None, seed: int, most: int | None = None) -> SampledImages:
    """`samples` of the images that `specs` name; without it all, and not more than `most`.

    The order is random in any case: images of a class lie together in a folder, and images that are routed together
    compete for the places of the same experts.

    Raises:
        SecateurError: not one folder or file, or one without so many images.
    """
    if not specs:
        raise SecateurError("--data is missing; the model reads images: a folder with one for every class, or .npz")
    if len(specs) != 1:
        raise SecateurError(f"--data is given {len(specs)} times; expected one folder or .npz file of images")
    images = read_images(Path(specs[0]).expanduser())
    number = min(len(images), most or len(images)) if samples is None else samples
    drawn = images.draw(number, seed=seed)
    about = {"specs": list(specs), "images": len(drawn), "of": len(images), "seed": seed, "digest": drawn.digest()}
    return SampledImages(images=drawn, about=about)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatches:
    """Gives (pixel_values (B, channels, S, S), labels (B,)), `size` images in each but the last."""

    images: Images
    pixels: Pixels
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.from_numpy(self.images.labels)
        for first in range(0, len(self.images), self.size):
            rows = range(first, min(first + self.size, len(self.images)))
            yield self.pixels([self.images.image(row) for row in rows]), labels[rows.start : rows.stop]


def batches_for(folder: ModelFolder, images: Images, batch_size: int | None) -> ImageBatches:
    """The images as the model of a folder takes them.

    Raises:
        SecateurError: the folder does not say how pixels are made, or a batch would cut through the images that the
            model routes together, so that results depended on its size.
    """
    together = folder.config.config.group_images or 1
    size = -(-BATCH // together) * together if batch_size is None else batch_size
    if size % together:
        raise SecateurError(
            f"--batch-size {size}: {folder.files.path}/config.json routes {together} images together (group_images), "
            "expected a multiple of that"
        )
    return ImageBatches(images=images, pixels=read_pixels(folder.files.path), size=size)
