"""What a model is run on, and where, as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import SecateurError
from secateur.files.given import check_least

if TYPE_CHECKING:
    from secateur.data.calibration import Calibration
    from secateur.model_folder.measure.image_batches import SampledImages

Activations = Literal["auto", "memory", "disk"]  # where hidden states wait between layers
ACTIVATIONS: tuple[Activations, ...] = ("auto", "memory", "disk")

SAMPLES, BATCH = 128, 8  # sequences
TEXT: dict[str, Any] = {"sequence_length": 512, "pack": True, "text_key": "text", "split": "train"}
TEXT_ONLY = (*TEXT, "activations")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options as they were given; None for those that were not.

    Raises:
        SecateurError: a number out of its range, or an unknown place for activations.
    """

    data: Sequence[str]
    samples: int | None
    sequence_length: int | None
    batch_size: int | None
    pack: bool | None
    text_key: str | None
    split: str | None
    seed: int
    activations: Activations | None = None

    def __post_init__(self) -> None:
        check_least(1, samples=self.samples, batch_size=self.batch_size)
        check_least(2, sequence_length=self.sequence_length)
        check_least(0, seed=self.seed)
        if self.activations not in (None, *ACTIVATIONS):
            raise SecateurError(f"--activations {self.activations}: expected one of {', '.join(ACTIVATIONS)}")

    @property
    def text_batch_size(self) -> int:
        return self.batch_size or BATCH

    @property
    def num_batches(self) -> int:
        """Of text."""
        return -(-(self.samples or SAMPLES) // self.text_batch_size)

    def text(self, model: Path) -> Calibration:
        """The sequences that the tokenizer of a model's folder makes; see `calibrate`."""
        from secateur.data.calibration import calibrate
        from secateur.data.tokenizer import load_tokenizer

        typed = {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in TEXT.items()
        }
        return calibrate(load_tokenizer(model), self.data, samples=self.samples or SAMPLES, seed=self.seed, **typed)

    def images(self, *, most: int | None = None, others: Sequence[str] = ()) -> SampledImages:
        """The images; see `image_batches.draw`.

        Args:
            others: further options for text that were typed.

        Raises:
            SecateurError: an option that only text knows.
        """
        from secateur.model_folder.measure.image_batches import draw

        typed = [f"--{name.replace('_', '-')}" for name in TEXT_ONLY if getattr(self, name) is not None] + list(others)
        if typed:
            raise SecateurError(f"{', '.join(typed)}: for text, but the model reads images; leave it out")
        return draw(self.data, self.samples, self.seed, most)


def device_named(name: str) -> str:
    """The device of `--device`.

    Raises:
        SecateurError: this machine has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SecateurError(f"--device {name}: {error}") from error
    return name
