"""`secateur eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands import data_options
from secateur.commands.bars import batches_bar, layers_bar
from secateur.commands.data_options import DataOptions, device_named
from secateur.commands.taken import taken_from
from secateur.errors import SecateurError
from secateur.files.progress import OnProgress

if TYPE_CHECKING:
    from secateur.data.calibration import Calibration
    from secateur.model_folder.read.modality import Modality


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
        typer.Option("--lm-eval", help="Tasks of the package lm-eval, such as arc_easy,hellaswag; needs it installed."),
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
    from secateur.model_folder.evaluation.lm_harness import check_installed, run_tasks

    if not data and lm_eval is None:
        raise SecateurError("nothing to measure: give text with --data, or images to a V-MoE, or tasks with --lm-eval")
    if len(set(models)) < len(models):
        raise SecateurError("a model is listed twice")
    tasks = [task.strip() for task in (lm_eval or "").split(",") if task.strip()]
    if lm_eval is not None:
        check_installed()
        if not tasks:
            raise SecateurError(f"--lm-eval {lm_eval!r}: it names no task")
    asked = taken_from(locals(), DataOptions)
    kind = _kind(models, with_data=bool(data))
    result: dict[str, Any] = {"format": "secateur-eval", "version": 1, "data": None, "models": [], "lm_eval": {}}
    show = not (quiet or as_json)
    if kind == "images":
        others = [name for name, given in (("--stream", stream), ("--lm-eval", lm_eval)) if given is not None]
        result |= _on_images(models, asked, others, device=device_named(device), show=show)
    elif data:
        result |= _on_text(models, asked, stream, device=device_named(device), show=show)
    for model in models if tasks else ():
        result["lm_eval"][str(model)] = run_tasks(model, tasks, batch_size=asked.text_batch_size)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        SHOW[kind](result)


def _kind(models: Sequence[Path], *, with_data: bool) -> Modality:
    from secateur.model_folder.read.modality import modality_in_config, modality_of
    from secateur.model_folder.read.model_folder import read_model_folder

    kinds = {
        model: modality_of(read_model_folder(model)) if with_data else modality_in_config(model) for model in models
    }
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{model}: {kind}" for model, kind in kinds.items())
        raise SecateurError(f"models of text and of images cannot be compared ({listed})")
    return kinds[models[0]]


def _on_text(
    models: Sequence[Path], asked: DataOptions, stream: bool | None, *, device: str, show: bool
) -> dict[str, Any]:
    from secateur.model_folder.evaluation.on_text import evaluate

    drawn = same_sequences(models, asked)
    with _bar_of_each(lambda model: layers_bar(model.name, num_batches=asked.num_batches, show=show)) as on_step:
        results = evaluate(
            models,
            drawn.batches(asked.text_batch_size),
            [domain for domain, count in drawn.domains.items() for _ in range(count)],
            stream=stream,
            device=device,
            seed=asked.seed,
            on_step=on_step,
        )
    return {"data": drawn.to_json(), "models": results}


def _on_images(
    models: Sequence[Path], asked: DataOptions, others: Sequence[str], *, device: str, show: bool
) -> dict[str, Any]:
    from secateur.model_folder.evaluation.on_images import check_models, evaluate_images

    check_models(models)  # reading images may take long
    drawn = asked.images(others=others)
    with _bar_of_each(lambda model: batches_bar(model.name, show=show)) as on_step:
        results = evaluate_images(
            models, drawn.images, batch_size=asked.batch_size, device=device, seed=asked.seed, on_step=on_step
        )
    return {"data": drawn.about, "models": results}


@contextlib.contextmanager
def _bar_of_each(
    make: Callable[[Path], contextlib.AbstractContextManager[OnProgress]],
) -> Iterator[Callable[[Path], OnProgress]]:
    """Gives what makes a bar for a model, one at a time."""
    with contextlib.ExitStack() as bars:

        def bar(model: Path) -> OnProgress:
            bars.close()
            return bars.enter_context(make(model))

        yield bar


def same_sequences(models: Sequence[Path], asked: DataOptions) -> Calibration:
    """The sequences that every model's own tokenizer makes of the text.

    Raises:
        SecateurError: two of them make different ones, so that losses a token cannot be compared.
    """
    first, *others = (asked.text(model) for model in models)
    for model, found in zip(models[1:], others, strict=True):
        if found.digest != first.digest:
            raise SecateurError(
                f"{model}: its tokenizer makes other tokens of the text than that of {models[0]}; a loss a token "
                "cannot be compared"
            )
    return first


def _show_text(result: dict[str, Any]) -> None:
    from secateur.model_folder.evaluation.perplexity import as_rows

    if result["models"]:
        first = result["models"][0]
        print(f"{first['blocks']} blocks, {first['tokens']} tokens to predict")
        _print_table(as_rows(result["models"]))
    for model, tasks in result["lm_eval"].items():
        for task, metrics in tasks.items():
            numbers = ", ".join(f"{name} {value}" for name, value in metrics.items() if isinstance(value, int | float))
            print(f"{model}: {task}: {numbers}")


def _show_images(result: dict[str, Any]) -> None:
    from secateur.model_folder.evaluation.accuracy import as_rows

    print(f"{result['data']['images']} images of {result['data']['of']}")
    _print_table(as_rows(result["models"]))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


SHOW = {"text": _show_text, "images": _show_images}
