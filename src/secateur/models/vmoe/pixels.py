"""From images of any size to what a V-MoE takes, as the preprocessor_config.json beside it says.

transformers' own image processor does it, in its form with Pillow: the other form needs torchvision and resizes with
other rounding, so that numbers would depend on what is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from secateur.data.images import Pixels8
from secateur.errors import SecateurError
from secateur.models.vmoe.configuration import VMoEConfig

FILE = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """Called with B images, uint8 (H, W, C), gives float32 (B, num_channels, image_size, image_size)."""

    source: Path
    processor: Any
    num_channels: int
    image_size: int

    def __call__(self, images: Sequence[Pixels8]) -> Tensor:
        """
        Raises:
            SecateurError: colour for a model of grey images; grey ones are repeated for a model of colour.
        """
        rows = [self._with_channels(image) for image in images]
        found = self.processor(rows, input_data_format="channels_last", return_tensors="pt")
        pixels: Tensor = found["pixel_values"].to(torch.float32)
        expected = (len(rows), self.num_channels, self.image_size, self.image_size)
        if pixels.shape != expected:
            raise SecateurError(f"{self.source}: it makes pixels {tuple(pixels.shape)}, the model takes {expected}")
        return pixels

    def _with_channels(self, image: Pixels8) -> Pixels8:
        channels = image.shape[2]
        if channels == self.num_channels:
            return image
        if channels != 1:
            raise SecateurError(
                f"an image of {channels} channels, but the model takes {self.num_channels}; make the images grey first"
            )
        return np.repeat(image, self.num_channels, axis=2)


def default_pixels(config: VMoEConfig) -> dict[str, Any]:
    """Content of a preprocessor_config.json: resized to the model's size, and pixels from -1 to 1."""
    half = [0.5] * config.num_channels
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }


def read_pixels(folder: Path) -> Pixels:
    """How the model in a folder takes images. No code of the folder runs.

    Raises:
        SecateurError: the folder has no preprocessor_config.json, transformers cannot use it, or it makes images of
            another size than the model takes.
    """
    file = folder / FILE
    if not file.is_file():
        raise SecateurError(
            f"{file}: not there, and nothing else says how pixels are scaled; `secateur convert-vmoe` writes it, "
            "or write json.dumps(secateur.models.vmoe.pixels.default_pixels(config)) into it if the model was trained "
            "on pixels from -1 to 1, or is yet to be trained"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto: Any = AutoImageProcessor
        processor = auto.from_pretrained(folder, backend="pil", trust_remote_code=False)
        pixels = Pixels(
            source=file, processor=processor, num_channels=config.num_channels, image_size=config.image_size
        )
        _check_scale(processor)
        side = 2 * config.image_size
        pixels([np.zeros((side, side, config.num_channels), dtype=np.uint8)])
    except SecateurError:
        raise
    except Exception as error:  # transformers has no error of its own for a file it cannot use
        message = f"{type(error).__name__}: {error}"
        raise SecateurError(f"{file}: transformers cannot use it ({message:.300})") from error
    return pixels


def _check_scale(processor: Any) -> None:
    """Raises SecateurError: a mean, a deviation or a factor of the pixels that is no number, or makes all equal."""
    for name, least in (("image_mean", -math.inf), ("image_std", 0.0), ("rescale_factor", 0.0)):
        found = getattr(processor, name, None)
        for value in found if isinstance(found, list | tuple) else [found]:
            is_number = isinstance(value, int | float) and math.isfinite(value) and value > least
            if found is not None and not is_number:
                above = "" if least < 0 else " above 0"
                raise SecateurError(f"{FILE}: {name} is {found!r:.60}, expected finite numbers{above}")
