"""Fine-tune a model folder into a new one: all of it, or nothing. What a killed run left lets it go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from transformers import PrinterCallback, TrainerState

from secateur.environment import peak_memory_bytes
from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.limits import SHOWN
from secateur.files.new_folder import check_target, written_beside
from secateur.files.records import as_record
from secateur.files.work_folder import Work, as_noted, differing, place_of_work, work_folder
from secateur.finetuning.images import image_task
from secateur.finetuning.model import LOGS, Loaded, check_trainable, load, write
from secateur.finetuning.options import SCHEDULES, FinetuneOptions, check_modality, in_parts, option
from secateur.finetuning.record import evaluations, known, losses, read_record, with_section
from secateur.finetuning.settings import DataSettings, FinetuneSettings, ModelSettings, RecordSettings, TrainingSettings
from secateur.finetuning.task import Task, size
from secateur.finetuning.text import text_task
from secateur.finetuning.trainer import (
    FinetuneLog,
    FinetuneTrainer,
    TrainingTime,
    accuracy,
    best_class,
    check_logger,
)
from secateur.model_folder.read.modality import Modality, modality_of
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.read.tensor_files import FINETUNED
from secateur.model_folder.rewrite.side_files import CARD
from secateur.train import checkpoints
from secateur.train.balance import BalanceCallback, attach_balance
from secateur.train.distributed.launch import world_size
from secateur.train.progress import only_our_messages
from secateur.train.resumed import check_state
from secateur.train.stopping import StopAtSignal
from secateur.train.trainer_arguments import trainer_arguments
from secateur.train.training_log import Progress

WHAT = "finetuning"  # name of the work folder
TASKS: dict[Modality, Callable[[ModelFolder, DataSettings, ModelSettings], Task]] = {
    "text": text_task,
    "images": image_task,
}
MOMENTUM = 0.9  # of --optimizer sgd


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides the result."""

    model: dict[str, Any]
    data: dict[str, Any]
    options: FinetuneOptions


def run_finetuning(
    model: Path,
    out: Path,
    options: FinetuneOptions,
    *,
    checkpoint_on_sigterm: bool = True,
    resume: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: Progress = lambda done, total, numbers: None,
) -> dict[str, Any]:
    """Train the model of a folder on text or images and write it to the new folder `out`.

    Checkpoints lie in a hidden folder beside `out` until it is there. On the CPU a run that was killed and resumed
    writes the same weights, to the last bit, as one that was not.

    Args:
        checkpoint_on_sigterm: see `StopAtSignal`.
        resume: go on with a killed run that had the same settings. restart: throw away what it left.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called after every step with (steps done, steps in all, "" or the newest numbers).

    Returns:
        What finetune.json in `out` says; of a dry run, as much of it as is known before the first step.

    Raises:
        SecateurError: bad input, or a loss that is no number; nothing is left under the name of `out`.
        OSError: the disk refused.
    """
    if world_size() > 1:
        raise SecateurError(f"fine-tuning runs in one process, WORLD_SIZE is {world_size()}; start it without torchrun")
    if resume and restart:
        raise SecateurError("--resume and --restart: give one of the two")
    settings = in_parts(options)
    check_logger(settings.record.report_to)
    killed_last = not restart and (out / FINETUNED).is_file() and place_of_work(out, WHAT).is_dir()
    if not killed_last:
        check_target(model, out)
    folder = read_model_folder(model)
    check_trainable(folder)
    with only_our_messages():
        modality = modality_of(folder)
        check_modality(options, modality, folder.config.model_type)
        task = TASKS[modality](folder, settings.data, settings.model)
        asked = _asked(folder, task, settings.record)
        if killed_last:
            return _finished(out, asked, dry_run=dry_run)
        loaded = _load(folder, task, settings.model)
        if dry_run:
            return known(folder, loaded, task, settings)
        if resume and not place_of_work(out, WHAT).is_dir():
            raise SecateurError(f"--resume: nothing was left of a fine-tuning into {out}")
        with _work(out, restart=restart) as work:
            check_target(model, out)  # another process may have been at it until now
            with _kept_for_resume(work):
                run, checkpoint = _begin(work, asked, resume=resume)
                record = known(folder, loaded, task, settings) | _train(
                    loaded,
                    folder,
                    task,
                    settings,
                    work.path,
                    run=run,
                    checkpoint=checkpoint,
                    checkpoint_on_sigterm=checkpoint_on_sigterm,
                    on_progress=on_progress,
                )
                with written_beside(out) as beside:
                    _write_all(loaded, folder, work, record, beside)
                    weights = folder.files.headers  # which are in memory since the begin
                    folder.files.check_unchanged(read=[name for name in folder.files.carried if name not in weights])
                work.remove()
    return record


def _finished(out: Path, asked: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
    """The record of a run that was killed when its result had its name already; what it left is removed.

    Raises:
        SecateurError: the result, or what lies beside it, is of another run.
    """
    record, as_json = read_record(out / FINETUNED)
    now = _as_asked(asked)
    with _work(out) as work:
        try:
            _check_same(Asked(model=now.model, data=record.data, options=record.options), now, out / FINETUNED)
            if work.before is None and work.entries():
                raise SecateurError(f"nothing says what {work.path} is of")
            _check_same(work.before or now, now, work.noted)
        except SecateurError as error:
            raise SecateurError(f"--out {out}: it is there already, and not from this run ({error})") from error
        if not dry_run:
            work.remove()
    return as_json


def _asked(folder: ModelFolder, task: Task, record: RecordSettings) -> dict[str, Any]:
    """All that decides the result, as it comes back from a file."""
    return as_noted({"model": folder.files.state, "data": dict(task.about), "options": record.options})


def _as_asked(asked: Mapping[str, Any]) -> Asked:
    return as_record(asked, Asked, "what is asked")


def _work(out: Path, *, restart: bool = False) -> contextlib.AbstractContextManager[Work[Asked]]:
    place = place_of_work(out, WHAT)
    refusal = f"--out {out}: another process is {WHAT} into it (it holds {place})"
    return work_folder(place, Asked, refusal, restart=restart, going_on="go on with --resume")


@contextlib.contextmanager
def _kept_for_resume(work: Work[Asked]) -> Iterator[None]:
    """Of a run that failed, keep what it can go on from, and nothing where there is none."""
    try:
        yield
    except BaseException:
        if checkpoints.last_whole(work.path) is None:
            work.remove()
        raise


def _begin(work: Work[Asked], asked: Mapping[str, Any], *, resume: bool) -> tuple[str, Path | None]:
    """(what tells this run from others, the checkpoint to go on from).

    Raises:
        SecateurError: a killed run lies there and nobody said what becomes of it, or it had other settings.
    """
    run = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    last = checkpoints.last_whole(work.path)
    if last is not None and not resume:
        raise SecateurError(
            f"a fine-tuning into the same folder was interrupted after {last.name}: go on with --resume, or throw it "
            "away with --restart"
        )
    if last is not None and work.before is None:
        raise SecateurError(
            f"--resume: {work.noted} is gone, so nothing says what {last} is of; begin anew with --restart"
        )
    if work.before is not None and resume:
        _check_same(work.before, _as_asked(asked), work.noted)
    if last is not None:
        checkpoints.last_whole(work.path, run)
    if last is None:
        work.clear()
    work.note(asked)
    checkpoints.remove_unfinished(work.path)
    return run, last


def _check_same(before: Asked, now: Asked, told_by: Path) -> None:
    options = before.options.to_json()
    for name, value in now.options.to_json().items():
        if (was := options[name]) != value:
            raise SecateurError(
                f"--resume: {option(name)} is {value!r}, but the run was started with {was!r} (options.{name} in "
                f"{told_by})"
            )
    for what in ("model", "data"):
        was, now_is = getattr(before, what), getattr(now, what)
        if names := differing(was, now_is):
            name = names[0]
            raise SecateurError(
                f"--resume: the {what} is not the one that the run was started with: {what}.{name} in {told_by} is "
                f"{was.get(name)!r:.{SHOWN}}, expected {now_is.get(name)!r:.{SHOWN}}; give what was given then, or "
                "begin anew with --restart"
            )


def _write_all(loaded: Loaded, source: ModelFolder, work: Work[Asked], record: Mapping[str, Any], folder: Path) -> None:
    write(loaded, source, folder)
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    atomic_write(card, with_section(text, record))
    if (work.path / LOGS).is_dir():
        os.rename(work.path / LOGS, folder / LOGS)
    atomic_write(folder / FINETUNED, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _load(folder: ModelFolder, task: Task, settings: ModelSettings) -> Loaded:
    loaded = load(folder, freeze=settings.freeze, new_classes=task.images if settings.new_head else None)
    with _balanced(loaded, folder, settings.router_aux_loss):  # what it refuses shows before the training
        return loaded


@contextlib.contextmanager
def _balanced(loaded: Loaded, folder: ModelFolder, router_aux_loss: float | None) -> Iterator[list[BalanceCallback]]:
    """The balance loss of --router-aux-loss on a model, in place of that of its config."""
    if router_aux_loss is None:
        yield []
        return
    loaded.model.config.get_text_config().output_router_logits = False
    if not router_aux_loss:
        yield []
        return
    handle = attach_balance(
        loaded.model,
        "mixtral",
        blocks=loaded.moe.blocks,
        coefficient=router_aux_loss,
        model_type=folder.config.text.model_type,
    )
    try:
        yield [BalanceCallback(handle)]
    finally:
        handle.detach()


def _train(
    loaded: Loaded,
    source: ModelFolder,
    task: Task,
    settings: FinetuneSettings,
    folder: Path,
    *,
    run: str,
    checkpoint: Path | None,
    checkpoint_on_sigterm: bool,
    on_progress: Progress,
) -> dict[str, Any]:
    """Train the model in place; returns what finetune.json says of it."""
    training = settings.training
    steps = training.num_steps(task.num_items)
    spent = TrainingTime()
    log = FinetuneLog(
        task,
        run=run,
        steps_per_epoch=training.steps_per_epoch(task.num_items),
        spent=spent,
        on_progress=on_progress,
    )
    stop = StopAtSignal()
    sgd = (torch.optim.SGD, {"lr": training.learning_rate, "momentum": MOMENTUM})
    with _balanced(loaded, source, settings.model.router_aux_loss) as balance:
        trainer = FinetuneTrainer(
            spent=spent,
            model=loaded.model,
            args=_arguments(task, training, settings.record, folder, steps, is_new=checkpoint is None),
            train_dataset=task.train,
            eval_dataset=dict(task.evaluation) or None,
            data_collator=task.collate,
            compute_metrics=accuracy if task.images else None,
            preprocess_logits_for_metrics=best_class if task.images else None,
            optimizer_cls_and_kwargs=sgd if training.optimizer == "sgd" else None,
            callbacks=[stop, *balance, log],
        )
        trainer.remove_callback(PrinterCallback)
        # asked to resume after its last step, the Trainer would make one more
        if checkpoint is not None and checkpoints.step_of(checkpoint) >= steps:
            check_state(checkpoint)
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            stop.trainer = trainer
            last_whole = checkpoints.naming_the_last_whole(folder, without_any="run the same command again")
            with stop.listening(wanted=checkpoint_on_sigterm), last_whole:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    sizes = {name: size(dataset) for name, dataset in task.evaluation.items()}
    speed = spent.items * task.per_item / spent.seconds if spent.seconds else None
    return {
        "losses": losses(history),
        "evaluations": evaluations(history, sizes),
        "seconds": spent.seconds,
        "resumed_after_step": None if checkpoint is None else checkpoints.step_of(checkpoint),
        f"{task.unit}_per_second": speed,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _arguments(
    task: Task, training: TrainingSettings, record: RecordSettings, folder: Path, steps: int, *, is_new: bool
) -> Any:
    arguments = trainer_arguments(
        folder,
        precision="bf16" if training.bf16 else "fp32",
        seed=training.seed,
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=task.eval_batch(training.batch_size),
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps(steps),
        lr_scheduler_type=SCHEDULES[training.schedule],
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        prediction_loss_only=task.images is None,
        logging_steps=min(record.log_steps, steps),
        eval_strategy="steps" if task.evaluation else "no",
        eval_steps=record.eval_steps or steps,
        eval_on_start=bool(task.evaluation) and is_new,
        save_strategy="steps" if record.save_steps else "no",
        save_steps=record.save_steps or steps,
        report_to=record.report_to,
    )
    if arguments.n_gpu > 1:
        raise SecateurError(
            f"Trainer would run the model on {arguments.n_gpu} GPUs of one process (DataParallel): choose one by "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments
