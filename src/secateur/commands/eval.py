"""`secateur eval`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands import data_options
from secateur.commands.bars import stage_bars
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.model_folder.evaluation.evaluate import Evaluation


def eval(
    models: Annotated[
        list[Path], typer.Argument(help="The folders of one or several models; the others are compared with the first.")
    ],
    data: data_options.Data = None,
    samples: data_options.Samples = None,
    sequence_length: data_options.SequenceLength = None,
    batch_size: data_options.BatchSize = None,
    pack: data_options.Pack = None,
    text_key: data_options.TextKey = None,
    split: data_options.Split = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of data, and of the ranges.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read a model layer by layer, or load it whole. Left out: as it fits in memory. Text only.",
        ),
    ] = None,
    device: data_options.Device = "auto",
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of the package lm-eval, such as arc_easy,hellaswag, or .yaml files; needs it installed.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the results, but no bars.")] = False,
) -> None:
    """Measure how well models predict text, or tell images, on the same data for all of them.

    Of text it is perplexity, by kind of text; of images (V-MoE) accuracy, cross entropy, images a second and operations
    an image. A difference comes with a 95 % range over the blocks of tokens or images, drawn in pairs. Use data that
    were not given to `secateur observe`, or a pruned model looks better than it is.

    Example: `secateur eval models/Qwen3-30B-A3B pruned --data code=code.jsonl --data prose=prose.jsonl`
    """
    from secateur.model_folder.evaluation.evaluate import evaluate

    with stage_bars(show=not (quiet or as_json)) as on_progress:
        result = evaluate(
            models,
            data=data,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            pack=pack,
            text_key=text_key,
            split=split,
            seed=seed,
            stream=stream,
            device=device,
            lm_eval=lm_eval,
            on_progress=on_progress,
        )
    if as_json:
        print(json.dumps(result.to_json(), indent=2, allow_nan=False))
    else:
        _show(result)
    failed = [
        f"{task} on {model}: {reason}" for model, tasks in result.failures.items() for task, reason in tasks.items()
    ]
    if failed:
        raise SecateurError(f"--lm-eval: {len(failed)} failed, and the rest is above: {'; '.join(failed)}")


def _show(result: Evaluation) -> None:
    """The table, which a notebook has too, and what lm-eval says."""
    found = result.to_json()
    if found["models"]:
        print(HEAD[result.modality](found))
        head, rows = result.table()
        _print_table([head, *rows])
    for model, tasks in found["lm_eval"].items():
        for task, metrics in tasks.items():
            numbers = ", ".join(f"{name} {value}" for name, value in metrics.items() if isinstance(value, int | float))
            print(f"{model}: {task}: {numbers}")


def _print_table(rows: Sequence[Sequence[object]]) -> None:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


HEAD: dict[str, Callable[[dict[str, Any]], str]] = {
    "text": lambda found: f"{found['models'][0]['blocks']} blocks, {found['models'][0]['tokens']} tokens to predict",
    "images": lambda found: f"{found['data']['images']} images of {found['data']['of']}",
}
