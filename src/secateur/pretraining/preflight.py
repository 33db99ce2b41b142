"""What can be refused before the data is read or a step is trained, and the plan of a run for --dry-run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from secateur.data.corpus import embedded_specs, read_documents
from secateur.data.prepare import PreparedData
from secateur.decide.limits import LayerLimits
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe, native_class
from secateur.modeling_secateur import adds_balance_loss
from secateur.pretraining.arguments import training_arguments
from secateur.pretraining.models import empty_model, given_tokenizer, model_config, model_facts
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.settings import (
    BalanceSettings,
    ModelSettings,
    PruningSettings,
    RecordSettings,
    TrainingSettings,
)
from secateur.surgery.module import check_model
from secateur.surgery.optimizer import check_optimizer, optimizer_state_bytes
from secateur.train.balance import attach_balance
from secateur.train.callback import refuse_arguments
from secateur.train.distributed.launch import world_size
from secateur.train.distributed.load import ParallelSizes, check_split, fewest_processes, parallel_sizes
from secateur.train.progress import only_our_messages
from secateur.train.schedule import Pruning, check_count, check_goal

# they wait for one validation loss, and here each domain has its own
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
FP32_BYTES = 4  # parameters, gradients and optimizer state are float32 whatever --precision is


@dataclass(frozen=True, kw_only=True, eq=False)
class Preflight:
    """What was found before the data was read; a run starts from it.

    sizes: of the job. tokenizer: None where one is trained on the data. moe: the model, on the meta device.
    limits: the admissible counts of every pruning, {layer: LayerLimits}. state_bytes: bytes of optimizer state a byte
    of parameters.
    """

    sizes: ParallelSizes
    tokenizer: PreTrainedTokenizerBase | None
    moe: MoEModel
    limits: tuple[Mapping[int, LayerLimits], ...]
    state_bytes: float


def check_before_data(options: PretrainOptions, sizes: ParallelSizes | None = None) -> Preflight:
    """Everything that can be refused without reading the data.

    Args:
        sizes: of the job, by default of this one.

    Raises:
        SecateurError: a data path that names nothing, a tokenizer that does not fit, an unknown
            family, a goal or floor that cannot be met, a pruning after the end, or an optimizer, schedule or balance
            option that is not known or that the model does not take.
    """
    settings = options.settings
    training, pruning = settings.training, settings.pruning
    read_documents(settings.data.data, text_key=settings.data.text_key)  # finds every path; reads no text
    tokenizer = given_tokenizer(settings.model)
    moe = describe_moe(empty_model(model_config(settings.model, tokenizer)))
    check_model(moe)
    wants = getattr(moe.model.config.get_text_config(), "output_router_logits", False)
    if wants and adds_balance_loss(native_class(moe.model)):
        raise SecateurError(
            "output_router_logits is on: --balance mixtral is the same loss, and is recorded and resumed"
        )
    sizes = sizes or parallel_sizes(settings.devices.fsdp, settings.devices.ep, settings.devices.tp)
    check_split(moe, sizes)
    check_batch(training.batch_size, sizes)
    _check_rearrange_ranks(pruning.rearrange_ranks, moe)
    _check_balance(settings.balance, moe)
    _check_times(pruning, training)
    limits = tuple(_limits(one, settings.devices.ep, pruning.rearrange_ranks, moe) for one in pruning.prunings)
    _check_goals(pruning.prunings, limits, moe)
    state_bytes = _try_optimizer(training, settings.record, prunes=bool(pruning.prunings))
    return Preflight(sizes=sizes, tokenizer=tokenizer, moe=moe, limits=limits, state_bytes=state_bytes)


def check_data(model: ModelSettings, training: TrainingSettings, data: PreparedData) -> None:
    """What can be refused once the data is there.

    Raises:
        SecateurError: its tokenizer does not fit the model, or it is smaller than one step.
    """
    model_config(model, data.tokenizer)
    found, needed = len(data.train.blocks), training.sequences_per_step
    if found < needed:
        raise SecateurError(
            f"data: found {found} sequences of {training.sequence_length} tokens for training, expected at least the "
            f"{needed} of one step (--batch-size {training.batch_size} x --accumulation {training.accumulation})"
        )


def check_batch(batch_size: int, sizes: ParallelSizes) -> None:
    """
    Raises:
        SecateurError: the sequences of a micro-batch do not divide over the processes.
    """
    if batch_size % sizes.fsdp:
        raise SecateurError(
            f"--batch-size {batch_size} is for all processes together, expected a multiple of the {sizes.fsdp} "
            "that see different tokens (--fsdp)"
        )


def plan_of_run(options: PretrainOptions) -> dict[str, Any]:
    """What a run would do, as JSON values, without reading data or training.

    Memory is for parameters, gradients and optimizer state; activations depend on the implementation and are not in it.

    Raises:
        SecateurError: see `check_before_data`.
    """
    settings = options.settings
    training, devices = settings.training, settings.devices
    needed = fewest_processes(devices.fsdp, devices.ep, devices.tp)
    processes = needed if world_size() == 1 else world_size()  # without torchrun, the plan of the job that is meant
    with only_our_messages():
        sizes = parallel_sizes(devices.fsdp, devices.ep, devices.tp, processes=processes)
        found = check_before_data(options, sizes)
    moe = found.moe
    size = FP32_BYTES * moe.num_parameters
    memory = {"parameters": size, "gradients": size, "optimizer": round(size * found.state_bytes)}
    experts = sum(block.num_experts * block.params_per_expert for block in moe.blocks.values())
    return {
        "model": {**model_facts(settings.model, moe), "expert_parameters": experts},
        "data": {"sources": list(settings.data.data or embedded_specs())},
        "training": {
            "steps": training.steps,
            "tokens_per_step": training.tokens_per_step,
            "tokens": training.tokens_per_step * training.steps,
            "checkpoints": -(-training.steps // settings.record.save_steps),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "control_run": settings.control is not None,
        },
        "devices": {"processes": processes, "fsdp": sizes.fsdp, "ep": sizes.ep, "tp": sizes.tp},
        "memory_bytes": memory,
        "memory_bytes_per_process": {name: -(-size // processes) for name, size in memory.items()},
        "prunings": [
            _pruning_facts(pruning, limits)
            for pruning, limits in zip(settings.pruning.prunings, found.limits, strict=True)
        ],
    }


def _pruning_facts(pruning: Pruning, limits: Mapping[int, LayerLimits]) -> dict[str, Any]:
    return {
        "when": pruning.when,
        "rule": {name: "inf" if value == float("inf") else value for name, value in pruning.rule.to_json().items()},
        "multiple_of": pruning.multiple_of,
        "least_experts_per_layer": {str(layer): limit.counts()[0] for layer, limit in limits.items()},
    }


def _check_rearrange_ranks(ranks: int, moe: MoEModel) -> None:
    for layer, count in moe.counts.items():
        if count % ranks:
            raise SecateurError(f"--rearrange-ranks {ranks}: layer {layer} has {count} experts, expected a multiple")


def _check_balance(balance: BalanceSettings, moe: MoEModel) -> None:
    """Refuse a kind of balance that the model does not take."""
    attach_balance(
        moe.model,
        balance.kind,
        blocks=moe.blocks,
        model_type=moe.model_type,
        sum_counts=lambda counts: counts,
        **balance.arguments,
    ).detach()


def _check_times(pruning: PruningSettings, training: TrainingSettings) -> None:
    """Refuse prunings that cannot come before the last step; windows are counted anew after each pruning."""
    window, step = pruning.window_steps, 0
    check_count("window_steps", window)
    for one in pruning.prunings:
        if one.at_step is not None:
            step = max(step + 1, one.at_step)
        elif one.at_tokens is not None:
            tokens = one.at_tokens - step * training.tokens_per_step
            step += window * max(1, -(-tokens // (window * training.tokens_per_step)))
        else:
            step = max(step + window * pruning.phase.min_windows, window * (training.warmup_steps // window + 1))
        if step >= training.steps:
            raise SecateurError(
                f"the pruning at {one.when} can be at step {step} at the earliest, expected before the end of "
                f"the run (--steps {training.steps}). Loads are compared every --window-steps ({window}), and can be "
                f"stable after {pruning.phase.min_windows} windows (--min-windows) and --warmup-steps "
                f"({training.warmup_steps}); --prune-at-step takes any step"
            )


def _limits(pruning: Pruning, ep: int, rearrange_ranks: int, moe: MoEModel) -> dict[int, LayerLimits]:
    """The admissible counts of a pruning, layer by layer."""
    try:
        return moe.limits(
            multiple_of=math.lcm(pruning.multiple_of, ep, rearrange_ranks),
            min_experts=pruning.min_experts,
            max_experts=pruning.max_experts,
        )
    except SecateurError as error:
        raise SecateurError(
            f"--multiple-of {pruning.multiple_of}, --min-experts {pruning.min_experts}, --max-experts "
            f"{pruning.max_experts}, --ep {ep}: {error}; the router itself needs {moe.min_experts} "
            f"(top-{moe.top_k})"
        ) from error


def _check_goals(prunings: tuple[Pruning, ...], limits: tuple[Mapping[int, LayerLimits], ...], moe: MoEModel) -> None:
    """Refuse a pruning that the floors forbid: whether it can be met does not depend on the loads."""
    for number, of_pruning in enumerate(limits, start=1):
        uniform = prunings[number - 1].rule.uniform
        if uniform and not set.intersection(*(set(limit.counts()) for limit in of_pruning.values())):
            counts = {layer: limit.counts() for layer, limit in of_pruning.items()}
            raise SecateurError(f"--uniform: no number of experts is admissible in every layer: {counts}")
        check_goal(
            prunings[:number],
            of_pruning,
            counts=moe.counts,
            params_per_expert=moe.params_per_expert,
            total_params=moe.num_parameters,
        )


def _try_optimizer(training: TrainingSettings, record: RecordSettings, *, prunes: bool) -> float:
    """Bytes of optimizer state a byte of parameters, from one step on a small layer.

    Raises:
        SecateurError: transformers cannot make the optimizer or schedule, or LAEP cannot follow it.
    """
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise SecateurError("--precision fp16 needs a GPU, found none; bf16 and fp32 train on the CPU")
    if training.schedule in METRIC_SCHEDULES:
        raise SecateurError(f"--schedule {training.schedule} follows a validation metric; that is not supported")
    probe = torch.nn.Linear(64, 64, bias=False)
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output folder
        arguments = training_arguments(training, record, Path(folder))
        try:
            trainer = Trainer(model=probe, args=arguments, eval_dataset=[0])
            optimizer = trainer.create_optimizer()
            trainer.create_scheduler(training.steps, optimizer)
            probe.weight.grad = torch.ones_like(probe.weight)
            optimizer.step()
        except Exception as error:  # optimizers and loggers of other packages may raise anything
            raise SecateurError(f"transformers does not take these training settings: {error}") from error
    refuse_arguments(arguments)
    if prunes:
        check_optimizer(optimizer)
    return optimizer_state_bytes(optimizer) / (probe.weight.numel() * probe.weight.element_size())
