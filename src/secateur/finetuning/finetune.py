"""Fine-tune a model folder, with every setting as a keyword."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.progress import OnStage, Steps
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.run import run_finetuning
from secateur.results import Written


@dataclass(frozen=True, kw_only=True)
class Finetuned(Written):
    """What `finetune` did, or in a dry run would do; `to_json` is what finetune.json says, and "dry_run".

    Args:
        out: the new folder. steps, epochs: of the training. trained_parameters: of num_parameters.
        losses: (step, training loss), where they were recorded; a loss that is not finite is None.
        evaluations: {"step", "loss", "domains"}, and "accuracy" of images, for every measurement on `eval_data`.
        seconds: of the training steps. All three are empty, or 0, in a dry run.
    """

    steps: int
    epochs: float
    num_parameters: int
    trained_parameters: int
    losses: tuple[tuple[int, float | None], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    seconds: float

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        rows: list[Sequence[object]] = [("steps", self.steps), ("epochs", self.epochs)]
        rows.append(("trained parameters", f"{self.trained_parameters:,} of {self.num_parameters:,}"))
        if self.losses:
            rows.append(("training loss", f"{_number(self.losses[0][1])} -> {_number(self.losses[-1][1])}"))
        if self.evaluations:
            first, last = self.evaluations[0], self.evaluations[-1]
            keys = [key for key in ("loss", "accuracy") if key in first]
            rows += [(f"{key} on eval_data", f"{first[key]:.4f} -> {last[key]:.4f}") for key in keys]
        return ("", "value"), [("model", self.out), *rows]


def finetune(
    model: StrPath,
    out: StrPath,
    *,
    data: StrPaths | None = None,
    eval_data: StrPaths | None = None,
    text_key: str = "text",
    split: str = "train",
    sequence_length: int | None = None,
    augment: bool = False,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    learning_rate: float = 2e-5,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    bf16: bool = False,
    seed: int = 0,
    freeze: str | Sequence[str] | None = None,
    router_aux_loss: float | None = None,
    new_head: bool = False,
    log_steps: int = 10,
    eval_steps: int | None = None,
    save_steps: int = 500,
    report_to: str = "none",
    checkpoint_on_sigterm: bool = True,
    resume: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
) -> Finetuned:
    """Fine-tune a model, pruned or not, on text or images, and write a model folder of the same kind.

    Its experts, tokenizer and other files are those of the source. Text is joined and cut into sequences, and the loss
    is on every token; chats go through the chat template. Checkpoints lie in a hidden folder beside `out` until it is
    there. On the CPU a run that was killed and resumed writes the same weights, to the last bit, as one that was not.
    The process's random numbers are seeded.

    Args:
        model: the folder of a Hugging Face model, pruned or not; it is only read.
        out: the folder to write; it must be new or empty.
        data: text: files, folders, globs, .jsonl with chat messages, or hf:NAME, after domain= if it shall count as
            that. Images: a folder with one subfolder a class, or an .npz with images and labels.
        eval_data: the same, to measure before, during and after.
        text_key: where the text is in .jsonl, .parquet, hf:. split: of an hf: dataset.
        sequence_length: tokens of a sequence; 512, or what the model can take, without it.
        augment: move images by up to an eighth of their sides, and flip every second one.
        steps: optimizer steps; one epoch without it. epochs: passes over the data, in place of `steps`.
        batch_size: sequences or images a micro-batch. gradient_accumulation: micro-batches a step.
        optimizer: adamw, or sgd with a momentum of 0.9.
        learning_rate: its peak. schedule: of the learning rate after warm-up.
        warmup: linear warm-up: below 1 a share of the steps, from 1 on a number of steps.
        weight_decay: weight decay. max_grad_norm: gradient clipping; 0 is off.
        bf16: compute in bfloat16; weights and optimizer stay in float32.
        seed: of the order of the data, and of all that is random in training.
        freeze: leave parameters as they are in whose name one of these regular expressions is found.
        router_aux_loss: weight of a loss that balances the experts, 0 for none; what the model's config says without
            it.
        new_head: give an image model a new classifier for the classes of the data.
        log_steps: steps between recorded losses.
        eval_steps: steps between measurements on `eval_data`; before and after only without it.
        save_steps: steps between checkpoints, which `resume` goes on from; 0 for none.
        report_to: loggers of transformers: tensorboard, wandb, trackio, ... or none.
        checkpoint_on_sigterm: hold SIGTERM, which schedulers send before they kill, until the step is done and its
            checkpoint written; then the signal takes its course. Of the main thread, and while steps are made.
        resume: go on with a killed run of the same settings. restart: throw away what a killed run left.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called with ("finetune", steps done, steps in all); the newest numbers, where there are some, stand
            behind a comma: "finetune, loss 1.234".

    Returns:
        What was recorded: steps, losses, measurements.

    Raises:
        SecateurError: bad input, or a loss that is not finite; nothing is left under the name of `out`.
        OSError: the disk refused.

    Example:
        >>> done = secateur.finetune("pruned", "tuned", data="chats.jsonl", eval_data="held-out.jsonl", epochs=2)
        >>> done.evaluations[-1]["loss"]
        1.987
    """
    check_given(finetune, locals())
    options = FinetuneOptions(
        data=tuple(as_texts(data)),
        eval_data=tuple(as_texts(eval_data)),
        text_key=text_key,
        split=split,
        sequence_length=sequence_length,
        augment=augment,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        seed=seed,
        freeze=tuple(as_texts(freeze)),
        router_aux_loss=router_aux_loss,
        new_head=new_head,
        log_steps=log_steps,
        eval_steps=eval_steps,
        save_steps=save_steps,
        report_to=report_to,
    )
    record = run_finetuning(
        Path(model),
        Path(out),
        options,
        checkpoint_on_sigterm=checkpoint_on_sigterm,
        resume=resume,
        restart=restart,
        dry_run=dry_run,
        on_progress=Steps("finetune", on_progress).show,
    )
    return Finetuned(
        out=Path(out),
        steps=record["steps"],
        epochs=record["epochs"],
        num_parameters=record["parameters"],
        trained_parameters=record["trained_parameters"],
        losses=tuple((line["step"], line["loss"]) for line in record.get("losses", ())),
        evaluations=tuple(record.get("evaluations", ())),
        seconds=record.get("seconds", 0.0),
        content=record | {"dry_run": dry_run},
    )


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
