"""The options of `observe`, `prune` and `eval` that say what a model is run on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.data.calibration import Calibration
    from secateur.model_folder.measure.image_batches import SampledImages

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a file, a folder, a glob, .jsonl with chat messages, or hf:NAME; after domain= if it shall count "
        "as that. Repeatable. Images: a folder with one subfolder a class, or an .npz with images and labels.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Sequences, 128 without it; or images, all without it, `observe` at most 10,000."
    ),
]
SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", min=2, help="Tokens of a sequence, 512 without it. Text only.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Sequences, 8 without it, or images, 64, that go through together."),
]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join documents and cut blocks (the default), or one document a sequence, padded. Text only.",
    ),
]
TextKey = Annotated[
    str | None,
    typer.Option("--text-key", help="Where the text is in .jsonl, .parquet, hf:; text without it. Text only."),
]
Split = Annotated[str | None, typer.Option("--split", help="The split of an hf: dataset, train without it. Text only.")]


class Activation(StrEnum):
    auto = "auto"
    memory = "memory"
    disk = "disk"


Activations = Annotated[
    Activation | None,
    typer.Option(
        "--activations",
        help="Where they wait between layers: disk (beside --out; a killed run goes on from there), memory, or auto, "
        "the default: memory for a model that would fit there as a whole. Text only.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where the model, or its layers, run: auto, cpu, cuda.")]

SAMPLES, BATCH = 128, 8  # sequences
TEXT: dict[str, Any] = {"sequence_length": 512, "pack": True, "text_key": "text", "split": "train"}
TEXT_ONLY = (*TEXT, "activations")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options as they were typed; None for those that were not."""

    data: list[str] | None
    samples: int | None
    sequence_length: int | None
    batch_size: int | None
    pack: bool | None
    text_key: str | None
    split: str | None
    seed: int
    activations: Activation | None = None

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
        return calibrate(
            load_tokenizer(model), self.data or [], samples=self.samples or SAMPLES, seed=self.seed, **typed
        )

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
        return draw(self.data or [], self.samples, self.seed, most)


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
