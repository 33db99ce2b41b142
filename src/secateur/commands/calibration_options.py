"""The options of `observe`, `prune` and `eval` that say which text a model is run on, and how."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.errors import SecateurError

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a file, a folder, a glob, .jsonl with chat messages, or hf:NAME; after domain= if it shall count "
        "as that. Repeatable.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Sequences to run.")]
SequenceLength = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a sequence.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences that go through a layer together.")]
Pack = Annotated[
    bool, typer.Option("--pack/--no-pack", help="Join documents and cut blocks, or one document a sequence, padded.")
]
TextKey = Annotated[str, typer.Option("--text-key", help="Where the text is in .jsonl, .parquet, hf:.")]
Split = Annotated[str, typer.Option("--split", help="The split of an hf: dataset.")]
Device = Annotated[str, typer.Option("--device", help="Where layers run: auto, cpu, cuda.")]


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
