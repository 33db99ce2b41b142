"""`secateur pretrain`: data, model, transformers' Trainer with LAEP in it, and the record of the run.

Every stage leaves its result in the run folder and is skipped when it is there, so a run that was killed at any moment
goes on with `resume`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from secateur.data.packing import BlockDataset
from secateur.data.prepare import PreparedData, load_prepared, prepare, save_prepared
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.report.write import write_report
from secateur.train import checkpoints
from secateur.train.arguments import tokens_per_step, training_arguments
from secateur.train.balance import BalanceCallback, attach_balance
from secateur.train.callback import LAEPCallback
from secateur.train.environment import hardware, versions
from secateur.train.models import given_tokenizer, load_model, make_model, model_config, model_facts
from secateur.train.options import PretrainOptions
from secateur.train.preflight import check_before_data, check_data
from secateur.train.processes import refuse_several_processes
from secateur.train.progress import RunProgress, StageProgress, only_our_messages
from secateur.train.run_folder import RunFolder, write_json
from secateur.train.run_log import RunLog
from secateur.train.summary import run_summary


def pretrain(options: PretrainOptions, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Start a run in the new or empty folder `out` and finish it.

    Returns:
        The content of report.json.

    Raises:
        SecateurError: bad input; found before training wherever it can be, and then `out` is left as it was.
        OSError: the disk refused a write; what is on it stays whole and `resume` goes on from there.
    """
    folder = RunFolder(out)
    folder.require_new()
    with only_our_messages():
        check_before_data(options)
        if options.model is not None:
            load_model(Path(options.model))
        with folder.made(), folder.locked():
            folder.require_new()
            write_json(folder.run, {"config": options.to_json(), "command": _command(), **_environment()})
            try:
                data = _data(options, folder, quiet=quiet)
            except Exception:
                folder.run.unlink()  # nothing was begun, so nothing may block the next try
                raise
            return _finish(options, folder, data, quiet=quiet)


def resume(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Go on with the run in `out` from its last whole checkpoint, with the settings it was started with.

    On the CPU the finished run is bit-identical to one that was never stopped.

    Raises:
        SecateurError: `out` holds no run, or its checkpoint does not fit its settings.
        OSError: see `pretrain`.
    """
    folder = RunFolder(out)
    options = PretrainOptions.from_json(folder.read_run()["config"])
    refuse_several_processes()
    with only_our_messages(), folder.locked():
        return _finish(options, folder, _data(options, folder, quiet=quiet), quiet=quiet)


def _finish(options: PretrainOptions, folder: RunFolder, data: PreparedData, *, quiet: bool) -> dict[str, Any]:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _stage(options, folder, data, quiet=quiet)
    if options.control:
        folder.control.path.mkdir(exist_ok=True)
        _stage(options.without_pruning(), folder.control, data, quiet=quiet)
    write_report(folder.path)
    for name in ("report.json", "plan.json"):
        shutil.copyfile(folder.path / name, folder.model / name)
    report: dict[str, Any] = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    return report


def _data(options: PretrainOptions, folder: RunFolder, *, quiet: bool) -> PreparedData:
    if folder.data.is_dir():
        return load_prepared(folder.data)
    with StageProgress(quiet=quiet) as progress:
        data = prepare(
            options.data,
            tokenizer=given_tokenizer(options),
            vocab_size=options.vocab_size,
            sequence_length=options.sequence_length,
            validation_share=options.validation_share,
            seed=options.seed,
            max_bytes=options.max_data_bytes,
            text_key=options.text_key,
            progress=progress,
        )
    check_data(options, data)
    save_prepared(data, folder.data)
    return data


def _stage(options: PretrainOptions, folder: RunFolder, data: PreparedData, *, quiet: bool) -> None:
    """One training, of the run or of its control, unless its summary says that it is done."""
    if not folder.summary.exists():
        _train(options, folder, data, quiet=quiet)
    # the model folder holds the result; a finished training has nothing to resume
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _train(options: PretrainOptions, folder: RunFolder, data: PreparedData, *, quiet: bool) -> None:
    checkpoints.remove_unfinished(folder.checkpoints)
    run = _identity(options, data)
    checkpoint = checkpoints.last_whole(folder.checkpoints, run)
    set_seed(options.seed)
    model = load_model(checkpoint) if checkpoint else make_model(options, model_config(options, data.tokenizer))
    if not checkpoint:
        command = folder.read_run()["command"] if folder.run.exists() else _command()
        facts = {"model": model_facts(options, describe_moe(model)), "data": data.report}
        write_json(folder.run, {"config": options.to_json(), "command": command, **_environment(), **facts})
    # asked to resume after its last step, the Trainer would make one more
    if not checkpoint or checkpoints.step_of(checkpoint) < options.steps:
        _train_steps(options, folder, data, model, checkpoint, run=run, quiet=quiet)
    folder.whole_plan().save(folder.plan)
    _save_model(folder, model, data.tokenizer)
    write_json(folder.summary, run_summary(options, folder, sum(one.numel() for one in model.parameters())))


def _train_steps(
    options: PretrainOptions,
    folder: RunFolder,
    data: PreparedData,
    model: PreTrainedModel,
    checkpoint: Path | None,
    *,
    run: str,
    quiet: bool,
) -> None:
    """From `checkpoint`, whose weights `model` has, or from the start to the last step; prunes the model in place."""
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    seconds = folder.rewind(done)
    laep = LAEPCallback(prunings=options.prunings(), window_steps=options.window_steps, phase=options.phase())
    moe = describe_moe(model)
    balance = attach_balance(
        model, options.balance, blocks=moe.blocks, model_type=moe.model_type, **options.balance_arguments()
    )
    validation = {domain: BlockDataset(blocks) for domain, blocks in data.validation.items()}
    name = "control" if folder.path.name == "control" and options.no_prune else "pretrain"
    with RunProgress(name, options.steps, done=done, quiet=quiet) as progress:
        log = RunLog(
            folder,
            laep,
            progress,
            run=run,
            tokens_per_step=tokens_per_step(options),
            domain_sizes={domain: len(blocks) for domain, blocks in validation.items()},
            seconds=seconds,
        )
        trainer = Trainer(
            model=model,
            args=training_arguments(options, folder.checkpoints),
            train_dataset=_whole_steps(options, data),
            eval_dataset=validation,
            callbacks=[laep, BalanceCallback(balance), log],
        )
        trainer.remove_callback(PrinterCallback)
        _keep_tensorboard(trainer, folder)
        log.trainer = trainer
        with _naming_a_failed_checkpoint(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    balance.detach()


def _keep_tensorboard(trainer: Trainer, folder: RunFolder) -> None:
    """Its own default is inside the folder of the checkpoints, which a finished run does not keep."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.path / "tensorboard")


def _whole_steps(options: PretrainOptions, data: PreparedData) -> Dataset[Any]:
    """The training blocks without the last ones that would make a step of fewer than the others.

    At the end of an epoch the Trainer makes a step of what is left; tokens a step, and so all counts of tokens, would
    not be constant. (Its own option to drop what is left would drop validation blocks too.) `check_data` has seen to
    it that there is one step's worth.
    """
    blocks = BlockDataset(data.train)
    return Subset(blocks, range(len(blocks) - len(blocks) % (options.batch_size * options.accumulation)))


def _save_model(folder: RunFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write beside, then rename: a folder named `model` is whole."""
    beside = folder.path / ".model-unfinished"
    for path in (beside, folder.model):
        shutil.rmtree(path, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        os.rename(beside, folder.model)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{folder.model} could not be written: {error}. Make room and go on with --resume") from error


def _identity(options: PretrainOptions, data: PreparedData) -> str:
    """What tells the checkpoints of this run from those of another: its settings and its tokens."""
    content = json.dumps([options.to_json(), data.train.digest()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _environment() -> dict[str, Any]:
    return {"versions": versions(), "hardware": hardware(), "secateur": versions()["secateur"]}


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


@contextlib.contextmanager
def _naming_a_failed_checkpoint(folder: RunFolder) -> Iterator[None]:
    """Add to the error of a failed save which checkpoint is still whole."""
    try:
        yield
    except Exception as error:
        unfinished = [path for path in folder.checkpoints.glob("checkpoint-*") if not checkpoints.is_whole(path)]
        if not unfinished or isinstance(error, SecateurError):
            raise
        last = checkpoints.last_whole(folder.checkpoints)
        raise OSError(
            f"{unfinished[0]} could not be written: {error}. "
            f"The last whole checkpoint is {last.name if last else 'none'}; make room and go on with --resume"
        ) from error
