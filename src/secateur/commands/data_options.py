"""The options of `observe`, `prune` and `eval` that say what a model is run on, and how."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

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
    """See `secateur.model_folder.measure.data_choice.Activations`."""

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
