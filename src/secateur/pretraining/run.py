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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from secateur.data.packing import BlockDataset
from secateur.data.prepare import PreparedData, copy_tokenizer
from secateur.environment import hardware, versions
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.files.atomic import atomic_write, fsync_folder, fsync_tree
from secateur.files.going_on import told_how_to_go_on
from secateur.files.json import read_object
from secateur.files.progress import OnStage, Steps
from secateur.files.refused import refusal_in_words, refused_by_the_disk
from secateur.files.seen import Seen
from secateur.modeling_secateur import ExpertLayout
from secateur.pretraining.arguments import training_arguments
from secateur.pretraining.data import MADE_AGAIN, data_of, seen_in
from secateur.pretraining.models import given_tokenizer, load_model, load_moe, make_model, model_config, model_facts
from secateur.pretraining.options import DEVICES, PretrainOptions
from secateur.pretraining.preflight import check_batch, check_before_data
from secateur.pretraining.run_folder import RunFolder, write_json
from secateur.pretraining.run_log import RunLog
from secateur.pretraining.settings import ModelSettings, RecordSettings, RunSettings
from secateur.pretraining.summary import run_summary
from secateur.reporting.write import report as write_report
from secateur.train import checkpoints
from secateur.train.balance import BalanceCallback, attach_balance
from secateur.train.callback import LAEPCallback
from secateur.train.distributed import launch
from secateur.train.distributed.load import ParallelSizes, parallel_sizes
from secateur.train.distributed.ranks import Ranks
from secateur.train.distributed.save import save_for_ranks, save_whole
from secateur.train.distributed.trainer import ResumableTrainer
from secateur.train.progress import only_our_messages
from secateur.train.stopping import StopAtSignal


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What a run and its control share.

    seen: the files of the data. layout: of their model, where it is known already; see `describe_moe`. command: what
    the run was started by.
    """

    data: PreparedData
    data_folder: Path
    seen: Seen
    sizes: ParallelSizes
    layout: ExpertLayout | None
    command: Any
    checkpoint_on_sigterm: bool
    on_progress: OnStage | None


def run_pretraining(
    options: PretrainOptions, out: Path, *, checkpoint_on_sigterm: bool = True, on_progress: OnStage | None = None
) -> dict[str, Any]:
    """Start a run in the new or empty folder `out` and finish it; under torchrun, on every rank.

    A job that torchrun restarts after a failure (--max-restarts) goes on with the run it finds.

    Args:
        checkpoint_on_sigterm: see `StopAtSignal`.

    Returns:
        The content of report.json.

    Raises:
        SecateurError: bad input; found before training wherever it can be, and then `out` is left as it was.
        OSError: the disk refused a write; what is on it stays whole and `resume` goes on from there.
    """
    folder, settings = RunFolder(out), options.settings
    if launch.was_restarted() and folder.run.exists():
        devices = {name: getattr(options, name) for name in DEVICES}
        return resume(out, devices=devices, checkpoint_on_sigterm=checkpoint_on_sigterm, on_progress=on_progress)
    if launch.is_main():
        folder.require_new()
    with only_our_messages():
        sizes = _sizes(settings)
        launch.join()
        found = check_before_data(options, sizes)
        if settings.model.model is not None:
            load_model(Path(settings.model.model))
        with folder.made() if launch.is_main() else contextlib.nullcontext(), _alone_in(folder):
            if launch.is_main():
                folder.require_new()
                write_json(folder.run, {"config": settings.record.options, "command": _command(), **_environment()})
            try:
                data = data_of(settings, folder, lambda: found.tokenizer, on_progress)
            except Exception:
                if launch.is_main():
                    folder.run.unlink()  # nothing was begun, so nothing may block the next try
                raise
            return _finish(
                settings,
                folder,
                Shared(
                    data=data,
                    data_folder=folder.data,
                    seen=seen_in(folder.data),
                    sizes=sizes,
                    layout=found.moe.layout,
                    command=_command(),
                    checkpoint_on_sigterm=checkpoint_on_sigterm,
                    on_progress=on_progress,
                ),
            )


def resume(
    out: Path,
    *,
    devices: Mapping[str, Any] | None = None,
    checkpoint_on_sigterm: bool = True,
    on_progress: OnStage | None = None,
) -> dict[str, Any]:
    """Go on with the run in `out` from its last whole checkpoint, with the settings it was started with.

    On the CPU the finished run is bit-identical to one that was never stopped, on the same number of processes.

    Args:
        devices: other values for the settings in `DEVICES`: the run may go on with other numbers of processes.
        checkpoint_on_sigterm: see `StopAtSignal`.

    Raises:
        SecateurError: `out` holds no run, or its checkpoint does not fit its settings.
        OSError: see `pretrain`.
    """
    folder = RunFolder(out)
    options = folder.read_options()
    # the number of data ranks is what the job has, unless it is given
    settings = replace(options, **{"fsdp": None, **(devices or {})}).settings
    try:
        sizes = _sizes(settings)
    except SecateurError as error:
        raise SecateurError(f"{error}; or go on with other sizes: --resume takes --fsdp, --ep and --tp") from error
    check_batch(settings.training.batch_size, sizes)
    with only_our_messages():
        launch.join()
        with _alone_in(folder):
            data = data_of(settings, folder, lambda: given_tokenizer(settings.model), on_progress)
            shared = Shared(
                data=data,
                data_folder=folder.data,
                seen=seen_in(folder.data),
                sizes=sizes,
                layout=None,
                command=folder.read_run().get("command"),
                checkpoint_on_sigterm=checkpoint_on_sigterm,
                on_progress=on_progress,
            )
            return _finish(settings, folder, shared)


def _sizes(settings: RunSettings) -> ParallelSizes:
    return parallel_sizes(settings.devices.fsdp, settings.devices.ep, settings.devices.tp)


def _alone_in(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """The lock of a run folder, held by rank 0 for the whole shared."""
    return _locked(folder) if launch.is_main() else contextlib.nullcontext()


@contextlib.contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    with folder.locked(), told_how_to_go_on("go on with --resume", folder.run.exists):
        yield


def _finish(settings: RunSettings, folder: RunFolder, shared: Shared) -> dict[str, Any]:
    """All that is left to do once the data is there."""
    with _threads(settings.training.threads):
        _stage(settings, folder, shared)
        if settings.control is not None:
            folder.control.path.mkdir(exist_ok=True)
            _stage(settings.control, folder.control, shared)
    report: dict[str, Any] = launch.once(lambda: _report(folder, shared.seen))
    return report


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads of torch, and afterwards as many as before; None changes nothing."""
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(folder: RunFolder, data: Seen) -> Any:
    data.check(advice=f"the model is whole; {MADE_AGAIN.format(folder.data)}")
    write_report(folder.path)
    for name in ("report.json", "plan.json"):
        atomic_write(folder.model / name, (folder.path / name).read_bytes())
    return read_object(folder.path / "report.json")


def _stage(settings: RunSettings, folder: RunFolder, shared: Shared) -> None:
    """One training, of the run or of its control, unless its summary says that it is done."""
    if not launch.once(folder.summary.exists):
        _train(settings, folder, shared)
    if launch.is_main():  # the model folder holds the result; a finished training has nothing to resume
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _train(settings: RunSettings, folder: RunFolder, shared: Shared) -> None:
    training, record = settings.training, settings.record
    run = _identity(record, shared.data)
    found = launch.once(lambda: _last_checkpoint(folder, run))
    checkpoint = Path(found) if found else None
    if checkpoint:
        moe = load_moe(checkpoint, shared.sizes, shared.layout)
    else:
        moe = _first_model(settings.model, folder, shared, seed=training.seed)
    if launch.is_main() and not checkpoint:
        facts = {"model": model_facts(settings.model, moe), "data": shared.data.report}
        write_json(folder.run, {"config": record.options, "command": shared.command, **_environment(), **facts})
    # asked to resume after its last step, the Trainer would make one more
    if not checkpoint or checkpoints.step_of(checkpoint) < training.steps:
        _train_steps(settings, folder, shared, moe, checkpoint, run=run)
    shared.seen.check(advice=MADE_AGAIN.format(shared.data_folder))
    _save_model(folder, moe.model, shared.data_folder)
    if launch.is_main():
        folder.whole_plan().save(folder.plan)
        summary = run_summary(
            folder,
            steps=training.steps,
            log_steps=record.log_steps,
            tokens_per_step=training.tokens_per_step,
            parameters=moe.num_parameters,
        )
        write_json(folder.summary, summary)


def _last_checkpoint(folder: RunFolder, run: str) -> str | None:
    checkpoints.remove_unfinished(folder.checkpoints)
    found = checkpoints.last_whole(folder.checkpoints, run)
    if found is None:
        return None
    folder.check_digests(found)
    return str(found)


def _first_model(settings: ModelSettings, folder: RunFolder, shared: Shared, *, seed: int) -> MoEModel:
    """The model of step 0, the same on any number of processes: rank 0 draws its weights and all load them."""
    if settings.model is not None:
        return load_moe(Path(settings.model), shared.sizes, shared.layout)
    set_seed(seed)
    if not shared.sizes.is_sharded:
        return describe_moe(make_model(settings, model_config(settings, shared.data.tokenizer)), shared.layout)
    start = folder.checkpoints / "start"
    if launch.is_main():
        shutil.rmtree(start, ignore_errors=True)
        save_for_ranks(make_model(settings, model_config(settings, shared.data.tokenizer)), start)
    launch.barrier()
    moe = load_moe(start, shared.sizes, shared.layout)
    launch.barrier()
    if launch.is_main():
        shutil.rmtree(start)
    return moe


def _train_steps(
    settings: RunSettings, folder: RunFolder, shared: Shared, moe: MoEModel, checkpoint: Path | None, *, run: str
) -> None:
    """From `checkpoint`, whose weights the model has, or from the start to the last step; prunes the model in place."""
    training, pruning, model = settings.training, settings.pruning, moe.model
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    seconds = folder.rewind(done) if launch.is_main() else 0.0
    balance = attach_balance(
        model,
        settings.balance.kind,
        blocks=moe.blocks,
        model_type=moe.model_type,
        sum_counts=Ranks(model).sum_counts,
        **settings.balance.arguments,
    )
    validation = {domain: BlockDataset(blocks) for domain, blocks in shared.data.validation.items()}
    name = "control" if folder.path.name == "control" and not pruning.prunings else "pretrain"
    steps = Steps(name, shared.on_progress if launch.is_main() else None, done=done, total=training.steps)
    laep = LAEPCallback(
        prunings=pruning.prunings,
        window_steps=pruning.window_steps,
        phase=pruning.phase,
        rearrange=pruning.rearrange,
        on_message=steps.say,
        moe=moe,
    )
    log = RunLog(
        folder,
        laep,
        steps,
        run=run,
        tokens_per_step=training.tokens_per_step,
        domain_sizes={domain: len(blocks) for domain, blocks in validation.items()},
        seconds=seconds,
    )
    stop = StopAtSignal()
    callbacks: list[TrainerCallback] = [stop, laep, BalanceCallback(balance)]
    trainer = ResumableTrainer(
        model=model,
        args=training_arguments(training, settings.record, folder.checkpoints, data_ranks=shared.sizes.fsdp),
        train_dataset=_whole_steps(training.sequences_per_step, shared.data),
        eval_dataset=validation,
        callbacks=[*callbacks, log] if launch.is_main() else callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    _keep_tensorboard(trainer, folder)
    stop.trainer = trainer
    stop.clock = log.clock
    with stop.listening(wanted=shared.checkpoint_on_sigterm), checkpoints.naming_the_last_whole(folder.checkpoints):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    balance.detach()


def _keep_tensorboard(trainer: Trainer, folder: RunFolder) -> None:
    """Its own default is inside the folder of the checkpoints, which a finished run does not keep."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.path / "tensorboard")


def _whole_steps(sequences_per_step: int, data: PreparedData) -> Dataset[Any]:
    """The training blocks without the last ones that would make a step of fewer than the others.

    At the end of an epoch the Trainer makes a step of what is left; tokens a step, and so all counts of tokens, would
    not be constant. (Its own option to drop what is left would drop validation blocks too.) `check_data` has seen to
    it that there is one step's worth.
    """
    blocks = BlockDataset(data.train)
    return Subset(blocks, range(len(blocks) - len(blocks) % sequences_per_step))


def _save_model(folder: RunFolder, model: PreTrainedModel, data: Path) -> None:
    """Write beside, then rename: a folder named `model` is whole. Shards are gathered on rank 0, which writes."""
    beside, before = folder.path / ".model-unfinished", folder.path / ".model-before"
    if launch.is_main():
        for path in (beside, before):
            shutil.rmtree(path, ignore_errors=True)
    launch.barrier()
    try:
        with refused_by_the_disk(beside):
            save_whole(model, beside)
            if launch.is_main():
                copy_tokenizer(data, beside)
                fsync_tree(beside)
                if folder.model.exists():  # of a start that was killed before its summary
                    os.rename(folder.model, before)
                os.rename(beside, folder.model)
                shutil.rmtree(before, ignore_errors=True)
                fsync_folder(folder.path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        last = checkpoints.last_whole(folder.checkpoints)
        raise OSError(
            f"{folder.model} could not be written: {refusal_in_words(error)}. Make room and go on with --resume; the "
            f"last whole checkpoint is {last.name if last else 'none'}"
        ) from error
    launch.barrier()


def _identity(record: RecordSettings, data: PreparedData) -> str:
    """What tells the checkpoints of this run from those of another: its options and its tokens."""
    options = {name: value for name, value in record.options.items() if name not in DEVICES}
    content = json.dumps([options, data.train.digest()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _environment() -> dict[str, Any]:
    return {"versions": versions(), "hardware": hardware(), "secateur": versions()["secateur"]}


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
