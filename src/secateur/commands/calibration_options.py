"""The options of `secateur prune` and `secateur eval` that say which text a model is run on, and how."""

from __future__ import annotations

from typing import Annotated

import typer

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
