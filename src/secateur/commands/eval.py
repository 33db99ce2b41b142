"""`secateur eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands.calibration_options import (
    BatchSize,
    Data,
    Device,
    Pack,
    Samples,
    SequenceLength,
    Split,
    TextKey,
    device_named,
)
from secateur.commands.layers_bar import layers_bar
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.data.calibration import Calibration


def eval(
    models: Annotated[
        list[Path], typer.Argument(help="The folders of one or several models; the others are compared with the first.")
    ],
    data: Data = None,
    samples: Samples = 128,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 8,
    pack: Pack = True,
    text_key: TextKey = "text",
    split: Split = "train",
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of text, and of the ranges.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read a model layer by layer, or load it whole. Left out: as it fits in memory.",
        ),
    ] = None,
    device: Device = "auto",
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", help="Tasks of the package lm-eval, such as arc_easy,hellaswag; needs it installed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the results, but no bars.")] = False,
) -> None:
    """Measure how well models predict text: perplexity, by kind of text, on the same tokens for all of them.

    A difference comes with a 95 % range over the blocks of tokens, drawn in pairs. Use text that was not given to
    `secateur observe`, or a pruned model looks better than it is.

    Example: `secateur eval models/Qwen3-30B-A3B pruned --data code=code.jsonl --data prose=prose.jsonl`
    """

    from secateur.checkpoint.evaluate import evaluate
    from secateur.checkpoint.lm_harness import check_installed, run_tasks

    if not data and lm_eval is None:
        raise SecateurError("nothing to measure: give text with --data, tasks with --lm-eval, or both")
    if len(set(models)) < len(models):
        raise SecateurError("a model is listed twice")
    tasks = [task.strip() for task in (lm_eval or "").split(",") if task.strip()]
    if lm_eval is not None:
        check_installed()
        if not tasks:
            raise SecateurError(f"--lm-eval {lm_eval!r}: it names no task")
    result: dict[str, Any] = {"format": "secateur-eval", "version": 1, "data": None, "models": [], "lm_eval": {}}
    if data:
        drawn = same_sequences(
            models,
            data,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            pack=pack,
            text_key=text_key,
            split=split,
        )
        result["data"] = drawn.to_json()
        show = not (quiet or as_json)
        with contextlib.ExitStack() as bars:

            def bar(model: Path) -> Callable[[int, int], None]:
                bars.close()  # one at a time
                return bars.enter_context(layers_bar(model.name, num_batches=-(-samples // batch_size), show=show))

            result["models"] = evaluate(
                models,
                drawn.batches(batch_size),
                [domain for domain, count in drawn.domains.items() for _ in range(count)],
                stream=stream,
                device=device_named(device),
                seed=seed,
                on_step=bar,
            )
    for model in models if tasks else ():
        result["lm_eval"][str(model)] = run_tasks(model, tasks, batch_size=batch_size)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _show(result)


def same_sequences(models: Sequence[Path], data: Sequence[str], **options: Any) -> Calibration:
    """The sequences that every model's own tokenizer makes of the text; `options` are those of `calibrate`.

    Raises:
        SecateurError: two of them make different ones, so that losses a token cannot be compared.
    """
    from secateur.data.calibration import calibrate
    from secateur.data.tokenizer import load_tokenizer

    first, *others = (calibrate(load_tokenizer(model), data, **options) for model in models)
    for model, found in zip(models[1:], others, strict=True):
        if found.digest != first.digest:
            raise SecateurError(
                f"{model}: its tokenizer makes other tokens of the text than that of {models[0]}; a loss a token "
                "cannot be compared"
            )
    return first


def _show(result: dict[str, Any]) -> None:
    from secateur.checkpoint.perplexity import as_rows

    if result["models"]:
        first, rows = result["models"][0], as_rows(result["models"])
        print(f"{first['blocks']} blocks, {first['tokens']} tokens to predict")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for model, tasks in result["lm_eval"].items():
        for task, metrics in tasks.items():
            numbers = ", ".join(f"{name} {value}" for name, value in metrics.items() if isinstance(value, int | float))
            print(f"{model}: {task}: {numbers}")
