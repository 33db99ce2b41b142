"""Measure one or several model folders on the same data: text, images, or the tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError
from secateur.files.given import StrPaths, as_texts, check_given
from secateur.files.progress import OnProgress, OnStage, stage
from secateur.files.seen import Seen
from secateur.model_folder.evaluation.lm_harness import check_installed, run_tasks
from secateur.model_folder.measure.data_choice import DataOptions, device_named
from secateur.model_folder.measure.data_pass import by_layer
from secateur.model_folder.read.modality import Modality, modality_in_config, modality_of
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.results import Result

if TYPE_CHECKING:
    from secateur.data.calibration import Calibration

FORMAT, VERSION = "secateur-eval", 1
AGAIN = "start again when nobody changes it"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """What `evaluate` measured. All but `models` and `tasks` is empty where only tasks of lm-eval were run.

    Args:
        models: the folders. modality: what they read.
        losses: of each, in nats: of text a token, of images the cross entropy. accuracies: of images, shares.
        differences: of each model from the first, in nats a token or, of images, in accuracy, as JSON with its 95 %
            range ("low", "high"); None of the first.
        tasks: {model: {task: {metric: value}}} of lm-eval. failures: {model: {task: why it has no result}} of the tasks
            that failed; models without such tasks are left out.
    """

    models: tuple[Path, ...]
    modality: Modality
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    differences: tuple[Mapping[str, Any] | None, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, Mapping[str, str]]

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        from secateur.model_folder.evaluation import accuracy, perplexity

        if not self.content["models"]:
            rows = [(model, *row) for model, tasks in self.tasks.items() for row in tasks.items()]
            return ("model", "task", "metrics"), rows
        head, *lines = {"text": perplexity, "images": accuracy}[self.modality].as_rows(self.content["models"])
        return head, lines


def evaluate(
    models: StrPaths,
    *,
    data: StrPaths | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    pack: bool | None = None,
    text_key: str | None = None,
    split: str | None = None,
    seed: int = 0,
    stream: bool | None = None,
    device: str = "auto",
    lm_eval: str | None = None,
    on_progress: OnStage | None = None,
) -> Evaluation:
    """Measure how well models predict text, or tell images, on the same data for all of them.

    Of text it is perplexity, by kind of text; of images (V-MoE) accuracy, cross entropy, images a second and operations
    an image. A difference comes with a 95 % range over the blocks of tokens or images, drawn in pairs. Use data that
    were not given to `observe`, or a pruned model looks better than it is. The command is called `eval`.

    Args:
        models: the folders of one or several models; the others are compared with the first.
        data: text: files, folders, globs, .jsonl with chat messages, or hf:NAME, after domain= if it shall count as
            that. Images: a folder with one subfolder a class, or an .npz with images and labels.
        samples: sequences, 128 without it; or images, all without it.
        sequence_length: tokens of a sequence, 512 without it. Text only.
        batch_size: sequences, 8 without it, or images, 64, that go through together.
        pack: join documents and cut blocks (the default), or one document a sequence, padded. Text only.
        text_key: where the text is in .jsonl, .parquet, hf:; "text" without it. Text only.
        split: of an hf: dataset, "train" without it. Text only.
        seed: of the choice of data, and of the ranges.
        stream: read a model layer by layer, or load it whole; without it, as it fits in memory. Text only.
        device: where the models, or their layers, run: auto, cpu, cuda.
        lm_eval: tasks of the package lm-eval, such as "arc_easy,hellaswag", or .yaml files of its form; needs it
            installed. A task that fails takes nothing from the others; see `Evaluation.failures`.
        on_progress: called with ("NAME, layer 2 of 24", batches done, batches in all), NAME being a model's folder; of
            models that are loaded whole and of images without a layer.

    Returns:
        The losses of every model, and how they differ.

    Raises:
        SecateurError: nothing to measure, a model or data that cannot be used, or models that cannot be compared.

    Example:
        >>> found = secateur.evaluate(["models/Qwen3-30B-A3B", "pruned"], data="held-out.jsonl")
        >>> found.losses
        (2.013, 2.021)
    """
    check_given(evaluate, locals())
    folders = [Path(model) for model in as_texts(models)]
    asked = DataOptions(
        data=as_texts(data),
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        pack=pack,
        text_key=text_key,
        split=split,
        seed=seed,
    )
    if not folders:
        raise SecateurError("no model is named, expected one or several")
    if not asked.data and lm_eval is None:
        raise SecateurError("nothing to measure: give text with --data, or images to a V-MoE, or tasks with --lm-eval")
    if len(set(folders)) < len(folders):
        raise SecateurError("a model is listed twice")
    tasks = [task.strip() for task in (lm_eval or "").split(",") if task.strip()]
    if lm_eval is not None:
        check_installed()
        if not tasks:
            raise SecateurError(f"--lm-eval {lm_eval!r}: it names no task")
    seen = {model: Seen.beside_each_other(model) for model in folders}
    kind = _kind(folders, with_data=bool(asked.data))
    found: dict[str, Any] = {"data": None, "models": []}
    if kind == "images":
        others = [name for name, given in (("--stream", stream), ("--lm-eval", lm_eval)) if given is not None]
        found = _on_images(folders, asked, others, device=device_named(device), on_stage=on_progress)
    elif asked.data:
        found = _on_text(folders, asked, stream, device=device_named(device), on_stage=on_progress)
    for files in seen.values() if asked.data else ():  # tokenizers too, which were read before the weights
        files.check(advice=AGAIN)
    runs = {
        str(model): run_tasks(model, tasks, batch_size=asked.text_batch_size, device=device_named(device), seen=files)
        for model, files in seen.items()
        if tasks
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        **found,
        "lm_eval": {model: run.results for model, run in runs.items()},
        "lm_eval_failures": {model: run.failures for model, run in runs.items() if run.failures},
    }
    return _evaluation(folders, kind, content)


def _evaluation(folders: Sequence[Path], kind: Modality, content: dict[str, Any]) -> Evaluation:
    models = content["models"]
    differences = [model["difference"] for model in models]
    return Evaluation(
        models=tuple(folders),
        modality=kind,
        losses=tuple(model["loss" if kind == "text" else "cross_entropy"] for model in models),
        accuracies=tuple(model["accuracy"] for model in models) if kind == "images" else (),
        differences=tuple(one["accuracy"] if one and kind == "images" else one for one in differences),
        tasks=content["lm_eval"],
        failures=content["lm_eval_failures"],
        content=content,
    )


def _kind(models: Sequence[Path], *, with_data: bool) -> Modality:
    kinds = {
        model: modality_of(read_model_folder(model)) if with_data else modality_in_config(model) for model in models
    }
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{model}: {kind}" for model, kind in kinds.items())
        raise SecateurError(f"models of text and of images cannot be compared ({listed})")
    return kinds[models[0]]


def _on_text(
    models: Sequence[Path], asked: DataOptions, stream: bool | None, *, device: str, on_stage: OnStage | None
) -> dict[str, Any]:
    from secateur.model_folder.evaluation.on_text import evaluate_text

    drawn = same_sequences(models, asked)
    results = evaluate_text(
        models,
        drawn.batches(asked.text_batch_size),
        [domain for domain, count in drawn.domains.items() for _ in range(count)],
        stream=stream,
        device=device,
        seed=asked.seed,
        on_step=lambda model: by_layer(model.name, asked.num_batches, on_stage),
    )
    return {"data": drawn.to_json(), "models": results}


def _on_images(
    models: Sequence[Path], asked: DataOptions, others: Sequence[str], *, device: str, on_stage: OnStage | None
) -> dict[str, Any]:
    from secateur.model_folder.evaluation.on_images import check_models, evaluate_images

    check_models(models)  # reading images may take long
    drawn = asked.images(others=others)
    on_step: Callable[[Path], OnProgress] = lambda model: stage(model.name, on_stage)  # noqa: E731
    results = evaluate_images(
        models, drawn.images, batch_size=asked.batch_size, device=device, seed=asked.seed, on_step=on_step
    )
    return {"data": drawn.about, "models": results}


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
