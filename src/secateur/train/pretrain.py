"""`secateur pretrain`: data, model, transformers' Trainer with LAEP in it, and the record of the run.

Every stage leaves its result in the run folder and is skipped when it is there, so a run that was killed at any moment
goes on with `resume`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from secateur.data.packing import BlockDataset
from secateur.data.prepare import PreparedData, load_prepared, prepare, save_prepared
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plan import Plan
from secateur.report.write import write_report
from secateur.surgery.module import check_model
from secateur.train import checkpoints
from secateur.train.balance import BALANCE, BalanceCallback, attach_balance
from secateur.train.callback import LAEPCallback
from secateur.train.environment import hardware, peak_memory_bytes, versions
from secateur.train.models import load_model, make_model, model_config
from secateur.train.options import PretrainOptions
from secateur.train.presets import PRESETS
from secateur.train.processes import refuse_several_processes
from secateur.train.progress import RunProgress, StageProgress
from secateur.train.run_folder import RunFolder, write_json
from secateur.train.run_log import RunLog


def pretrain(options: PretrainOptions, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Start a run in the new or empty folder `out` and finish it.

    Returns:
        The content of report.json.

    Raises:
        SecateurError: bad input; found before training wherever it can be.
        OSError: the disk refused a write; what is on it stays whole and `resume` goes on from there.
    """
    folder = RunFolder(out)
    folder.require_new()
    check_before_data(options)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.run, {"config": options.to_json(), "command": _command(), **_environment()})
    return _finish(options, folder, quiet=quiet)


def resume(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Go on with the run in `out` from its last whole checkpoint, with the settings it was started with.

    On the CPU the finished run is bit-identical to one that was never stopped.

    Raises:
        SecateurError: `out` holds no run, or its checkpoint does not fit its settings.
    """
    folder = RunFolder(out)
    return _finish(PretrainOptions.from_json(folder.read_run()["config"]), folder, quiet=quiet)


def check_before_data(options: PretrainOptions) -> PreTrainedModel:
    """Everything that can be refused without reading the data; returns the model on the meta device.

    Raises:
        SecateurError: several processes, an unknown family, a goal or floor that cannot be met, an optimizer or balance
            option the model does not take, a tokenizer that does not fit.
    """
    refuse_several_processes()
    tokenizer = load_tokenizer(Path(options.tokenizer)) if options.tokenizer else None
    config = model_config(options, tokenizer)
    with torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    moe = describe_moe(model)
    check_model(moe)
    if options.balance not in BALANCE:
        raise SecateurError(f"--balance is {options.balance!r}, expected one of {', '.join(BALANCE)}")
    attach_balance(
        model,
        options.balance,
        blocks=moe.blocks,
        model_type=moe.model_type,
        **_strength(options),
    ).detach()
    arguments = _arguments(options, Path("unused"), eval_at_all=False)
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments)
    optimizer = trainer.create_optimizer()
    callback = LAEPCallback(prunings=options.prunings(), window_steps=options.window_steps, phase=options.phase())
    callback.check(model, optimizer, arguments)
    for pruning in options.prunings():
        if pruning.at_step is not None and pruning.at_step >= options.steps:
            raise SecateurError(f"a pruning at step {pruning.at_step} is not before the end of the run ({options.steps})")
    return model


def plan_of_run(options: PretrainOptions) -> dict[str, Any]:
    """What a run would do, without reading data or training: for --dry-run.

    Memory is for parameters, gradients and optimizer state; activations depend on the implementation and are not in it.
    """
    model = check_before_data(options)
    moe = describe_moe(model)
    parameters = moe.num_parameters
    experts = sum(block.num_experts * block.params_per_expert for block in moe.blocks.values())
    tokens_per_step = _tokens_per_step(options)
    state = 2 if options.optimizer.startswith(("adamw", "adam")) else 1
    return {
        "model": {**_model_facts(options, model), "expert_parameters": experts},
        "data": {"sources": list(options.data) or ["the interpreter's standard library", "pydoc_data.topics"]},
        "training": {
            "steps": options.steps,
            "tokens_per_step": tokens_per_step,
            "tokens": tokens_per_step * options.steps,
            "checkpoints": options.steps // options.save_steps,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "control_run": options.control,
        },
        "memory_bytes": {"parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer": 4 * parameters * state},
        "prunings": [_pruning_facts(pruning) for pruning in options.prunings()],
        "least_experts_per_layer": {layer: limit.counts()[0] for layer, limit in moe.limits().items()},
    }


def _finish(options: PretrainOptions, folder: RunFolder, *, quiet: bool) -> dict[str, Any]:
    refuse_several_processes()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _one_run_at_a_time(folder):
        data = _data(options, folder, quiet=quiet)
        if not folder.summary.exists():
            _train(options, folder, data, quiet=quiet)
        if options.control and not folder.control.summary.exists():
            plain = {"no_prune": True, "prune": (), "prune_at_step": None, "prune_at_tokens": None, "control": False}
            rules = {"alpha": None, "beta": None, "target_params": None, "max_rerouted": None}
            folder.control.path.mkdir(exist_ok=True)
            _train(replace(options, **plain, **rules), folder.control, data, quiet=quiet)
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
            tokenizer=load_tokenizer(Path(options.tokenizer)) if options.tokenizer else None,
            vocab_size=options.vocab_size,
            sequence_length=options.sequence_length,
            validation_share=options.validation_share,
            seed=options.seed,
            max_bytes=options.max_data_bytes,
            text_key=options.text_key,
            progress=progress,
        )
    model_config(options, data.tokenizer)  # the tokenizer must fit before anything is kept
    save_prepared(data, folder.data)
    return data


def _train(options: PretrainOptions, folder: RunFolder, data: PreparedData, *, quiet: bool) -> None:
    checkpoints.remove_unfinished(folder.checkpoints)
    checkpoint = checkpoints.last_whole(folder.checkpoints)
    set_seed(options.seed)
    config = model_config(options, data.tokenizer)
    model = load_model(checkpoint) if checkpoint else make_model(options, config)
    if not checkpoint:
        _write_run(options, folder, model, data)
    seconds = folder.rewind(checkpoints.step_of(checkpoint) if checkpoint else 0)

    laep = LAEPCallback(prunings=options.prunings(), window_steps=options.window_steps, phase=options.phase())
    moe = describe_moe(model)
    balance = attach_balance(
        model, options.balance, blocks=moe.blocks, model_type=moe.model_type, **_strength(options)
    )
    validation = {domain: BlockDataset(blocks) for domain, blocks in data.validation.items()}
    name = "control" if folder.path.name == "control" and options.no_prune else "pretrain"
    with RunProgress(name, options.steps, quiet=quiet) as progress:
        log = RunLog(
            folder,
            laep,
            progress,
            tokens_per_step=_tokens_per_step(options),
            domain_sizes={domain: len(blocks) for domain, blocks in validation.items()},
            seconds=seconds,
        )
        trainer = Trainer(
            model=model,
            args=_arguments(options, folder.checkpoints),
            train_dataset=BlockDataset(data.train),
            eval_dataset=validation,
            callbacks=[laep, BalanceCallback(balance), log],
        )
        trainer.remove_callback(PrinterCallback)
        log.trainer = trainer
        with _naming_a_failed_checkpoint(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if log.last_eval is None or options.steps % options.eval_steps:
            trainer.evaluate()
    balance.detach()
    assert laep.pruner is not None and log.last_eval is not None
    laep.pruner.plan.save(folder.plan)
    _save_model(folder, model, data.tokenizer)
    write_json(folder.summary, _summary(options, folder, model, log.last_eval))
    shutil.rmtree(folder.checkpoints)  # the model folder holds the result; a finished run has nothing to resume


def _save_model(folder: RunFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write beside, then rename: a folder named `model` is whole."""
    beside = folder.path / ".model-unfinished"
    for path in (beside, folder.model):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.rename(beside, folder.model)


def _summary(
    options: PretrainOptions, folder: RunFolder, model: PreTrainedModel, last_eval: dict[str, Any]
) -> dict[str, Any]:
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    events = json.loads(folder.events.read_text(encoding="utf-8"))
    first, last = (events[0]["step"], events[-1]["step"]) if events else (options.steps, options.steps)
    # The first interval has warm-up in it, and the one that holds a pruning is of both models.
    before = [line["tokens_per_second"] for line in train[1:] if line["step"] < first]
    after = [line["tokens_per_second"] for line in train if line["step"] >= last + options.log_steps]
    return {
        "finished": True,
        **last_eval,
        "tokens_per_second": {
            "before": statistics.median(before) if before else None,
            "after": statistics.median(after) if after and events else None,
        },
        "steps": options.steps,
        "tokens": options.steps * _tokens_per_step(options),
        "seconds": train[-1]["seconds"] if train else 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _arguments(options: PretrainOptions, folder: Path, *, eval_at_all: bool = True) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            lr_scheduler_type=options.schedule,
            weight_decay=options.weight_decay,
            adam_beta2=0.95,
            optim=options.optimizer,
            max_grad_norm=options.max_grad_norm,
            bf16=options.precision == "bf16",
            fp16=options.precision == "fp16",
            activation_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            data_seed=options.seed,
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            prediction_loss_only=True,
            logging_steps=options.log_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if eval_at_all else "no",
            eval_steps=options.eval_steps,
            save_strategy="steps",
            save_steps=options.save_steps,
            save_total_limit=2,
            report_to=options.report_to,
            disable_tqdm=True,
        )
    except (ValueError, ImportError) as error:
        raise SecateurError(f"transformers does not take these training settings: {error}") from error


def _write_run(options: PretrainOptions, folder: RunFolder, model: PreTrainedModel, data: PreparedData) -> None:
    write_json(
        folder.run,
        {
            "config": options.to_json(),
            "command": _command(),
            **_environment(),
            "model": _model_facts(options, model),
            "data": data.report,
        },
    )


def _model_facts(options: PretrainOptions, model: PreTrainedModel) -> dict[str, Any]:
    moe = describe_moe(model)
    return {
        "model_type": moe.model_type,
        "attention": PRESETS[options.preset][1] if options.preset else moe.model_type,
        "parameters": moe.num_parameters,
        "layers": model.config.num_hidden_layers,
        "top_k": moe.top_k,
        "experts": {str(layer): count for layer, count in moe.counts.items()},
    }


def _pruning_facts(pruning: Any) -> dict[str, Any]:
    when = f"step {pruning.at_step}" if pruning.at_step else f"tokens {pruning.at_tokens}" if pruning.at_tokens else None
    rule = {key: str(value) for key, value in vars(pruning.rule).items() if value is not None}
    return {"when": when or "when the loads are stable", "rule": rule, "multiple_of": pruning.multiple_of}


def _strength(options: PretrainOptions) -> dict[str, float]:
    if options.balance_strength is None:
        return {}
    return {"update_rate" if options.balance == "bias" else "coefficient": options.balance_strength}


def _tokens_per_step(options: PretrainOptions) -> int:
    return options.batch_size * options.accumulation * options.sequence_length


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


@contextlib.contextmanager
def _one_run_at_a_time(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends."""
    import fcntl

    with (folder.path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SecateurError(f"{folder.path}: another process is running in this folder") from error
        yield
