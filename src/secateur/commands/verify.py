"""`secateur verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.bars import stage_bars
from secateur.commands.shown import show

WORDS = {True: "passed", False: "FAILED", None: "not checked"}


def verify(
    source: Annotated[
        list[Path],
        typer.Argument(help="The folder of the model that was pruned; or of all parents, as `upcycle` was given them."),
    ],
    pruned: Annotated[Path, typer.Argument(help="The folder that `apply`, `prune` or `upcycle` wrote.")],
    tokens: Annotated[
        int, typer.Option("--tokens", help="Length of the sample that both models are run on; 0 runs neither.")
    ] = 32,
    text: Annotated[Path | None, typer.Option("--text", help="Take the sample from this file; random if none.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Prove what a pruned or grown model was made of. Ends with status 1 where a check fails.

    Of a pruned one, every tensor and every other file is compared with the source byte by byte. The result must load
    with nothing missing and compute what the source computes with the dropped experts barred; both models run one
    decoder layer at a time. Where the result fits in memory, it must generate, too.

    Of a grown one, every tensor is made anew from the parents: copies are equal byte for byte, averages to rounding.

    Example: `secateur verify models/Qwen3-30B-A3B pruned --tokens 256`
    """
    from secateur.folder_kinds.verify import verify as function

    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = function(source, pruned, tokens=tokens, text=text, seed=seed, on_progress=on_progress)
    lines = [f"{WORDS[check.passed]}: {check.claim} ({check.detail})" for check in result.checks]
    show(result, "\n".join(lines), as_json=as_json, quiet=quiet)
    if not result.passed:
        raise typer.Exit(1)
