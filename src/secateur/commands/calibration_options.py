"""The options that say which text a model is run on."""

from __future__ import annotations

from typing import Annotated

import typer

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a file or folder (.txt, .jsonl, .parquet) or a name of `datasets`; NAME=... puts it under a name. "
        "May be given several times.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Blocks of text.")]
SequenceLength = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a block.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Blocks run at a time.")]
