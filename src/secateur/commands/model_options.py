"""The options of commands that read a model folder."""

from __future__ import annotations

from typing import Annotated

import typer

ExpertsFrom = Annotated[
    str,
    typer.Option(
        "--experts-from",
        help="What says how many experts a layer has: config (config.json), or files, for a model that a tool pruned "
        "without updating its config.json.",
    ),
]
