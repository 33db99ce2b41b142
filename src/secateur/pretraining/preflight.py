"""What can be refused before the data is read or a step is trained, and the plan of a run for --dry-run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from secateur.data.corpus import embedded_specs, read_documents
from secateur.data.prepare import PreparedData
from secateur.decide.by_load import target_params
from secateur.decide.limits import LayerLimits
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.pretraining.arguments import tokens_per_step, training_arguments
from secateur.pretraining.models import empty_model, given_tokenizer, model_config, model_facts
from secateur.pretraining.options import PretrainOptions
from secateur.surgery.module import check_model
from secateur.surgery.optimizer import optimizer_state_bytes
from secateur.train.balance import attach_balance
from secateur.train.callback import LAEPCallback
from secateur.train.distributed.launch import world_size
from secateur.train.distributed.load import ParallelSizes, check_split, fewest_processes, parallel_sizes
from secateur.train.progress import only_our_messages
from secateur.train.schedule import Pruning

# they wait for one validation loss, and here each domain has its own
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
FP32_BYTES = 4  # parameters, gradients and optimizer state are float32 whatever --precision is


def check_before_data(options: PretrainOptions, sizes: ParallelSizes | None = None) -> MoEModel:
    """Everything that can be refused without reading the data.

    Args:
        sizes: of the job, by default of this one.

    Returns:
        The description of the model, on the meta device.

    Raises:
        SecateurError: a data path that names nothing, a tokenizer that does not fit, an unknown
            family, a goal or floor that cannot be met, a pruning after the end, or an optimizer, schedule or balance
            option that is not known or that the model does not take.
    """
    read_documents(options.data, text_key=options.text_key)  # finds every path; reads no text
    moe = describe_moe(empty_model(model_config(options, given_tokenizer(options))))
    check_model(moe)
    _check_devices(options, moe, sizes or parallel_sizes(options.fsdp, options.ep, options.tp))
    attach_balance(
        moe.model,
        options.balance,
        blocks=moe.blocks,
        model_type=moe.model_type,
        sum_counts=lambda counts: counts,
        **options.balance_arguments(),
    ).detach()
    _check_times(options)
    for number, limits in enumerate(_limits(options, moe), start=1):
        _check_goal(options.prunings()[:number], limits, moe)
    _try_optimizer(options, moe)
    return moe


def check_data(options: PretrainOptions, data: PreparedData) -> None:
    """What can be refused once the data is there.

    Raises:
        SecateurError: its tokenizer does not fit the model, or it is smaller than one step.
    """
    model_config(options, data.tokenizer)
    found, needed = len(data.train.blocks), options.batch_size * options.accumulation
    if found < needed:
        raise SecateurError(
            f"data: found {found} sequences of {options.sequence_length} tokens for training, expected at least the "
            f"{needed} of one step (--batch-size {options.batch_size} x --accumulation {options.accumulation})"
        )


def plan_of_run(options: PretrainOptions) -> dict[str, Any]:
    """What a run would do, as JSON values, without reading data or training.

    Memory is for parameters, gradients and optimizer state; activations depend on the implementation and are not in it.

    Raises:
        SecateurError: see `check_before_data`.
    """
    needed = fewest_processes(options.fsdp, options.ep, options.tp)
    processes = needed if world_size() == 1 else world_size()  # without torchrun, the plan of the job that is meant
    sizes = parallel_sizes(options.fsdp, options.ep, options.tp, processes=processes)
    with only_our_messages():
        moe = check_before_data(options, sizes)
        optimizer_bytes = _try_optimizer(options, moe)
    size = FP32_BYTES * moe.num_parameters
    experts = sum(block.num_experts * block.params_per_expert for block in moe.blocks.values())
    state = round(size * optimizer_bytes)
    return {
        "model": {**model_facts(options, moe), "expert_parameters": experts},
        "data": {"sources": list(options.data or embedded_specs())},
        "training": {
            "steps": options.steps,
            "tokens_per_step": tokens_per_step(options),
            "tokens": tokens_per_step(options) * options.steps,
            "checkpoints": -(-options.steps // options.save_steps),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "control_run": options.control,
        },
        "devices": {"processes": processes, "fsdp": sizes.fsdp, "ep": sizes.ep, "tp": sizes.tp},
        "memory_bytes": {"parameters": size, "gradients": size, "optimizer": state},
        "memory_bytes_per_process": {
            name: -(-size // processes)
            for name, size in (("parameters", size), ("gradients", size), ("optimizer", state))
        },
        "prunings": [
            _pruning_facts(pruning, limits)
            for pruning, limits in zip(options.prunings(), _limits(options, moe), strict=True)
        ],
    }


def _pruning_facts(pruning: Pruning, limits: Mapping[int, LayerLimits]) -> dict[str, Any]:
    return {
        "when": _when(pruning),
        "rule": {name: "inf" if value == float("inf") else value for name, value in pruning.rule.to_json().items()},
        "multiple_of": pruning.multiple_of,
        "least_experts_per_layer": {str(layer): limit.counts()[0] for layer, limit in limits.items()},
    }


def _when(pruning: Pruning) -> str:
    if pruning.at_step is not None:
        return f"step {pruning.at_step}"
    return "the stable phase" if pruning.at_tokens is None else f"{pruning.at_tokens} tokens"


def _limits(options: PretrainOptions, moe: MoEModel) -> list[dict[int, LayerLimits]]:
    """The admissible counts of every pruning, layer by layer."""
    try:
        ranks = math.lcm(options.ep, options.rearrange_ranks or 1)
        return [
            moe.limits(
                multiple_of=math.lcm(pruning.multiple_of, ranks),
                min_experts=pruning.min_experts,
                max_experts=pruning.max_experts,
            )
            for pruning in options.prunings()
        ]
    except SecateurError as error:
        raise SecateurError(
            f"--multiple-of {options.multiple_of}, --min-experts {options.min_experts}, --max-experts "
            f"{options.max_experts}, --ep {options.ep}: {error}; the router itself needs {moe.min_experts} "
            f"(top-{moe.top_k})"
        ) from error


def _check_goal(prunings: tuple[Pruning, ...], limits: Mapping[int, LayerLimits], moe: MoEModel) -> None:
    """Refuse a last pruning that the floors forbid: whether it can be met does not depend on the loads.

    Each goal is a share of what the one before left, so from here goals multiply.
    """
    rule = prunings[-1].rule
    if rule.uniform and not set.intersection(*(set(limit.counts()) for limit in limits.values())):
        counts = {layer: limit.counts() for layer, limit in limits.items()}
        raise SecateurError(f"--uniform: no number of experts is admissible in every layer: {counts}")
    if rule.target_params is None:
        return
    share = 1.0
    for pruning in prunings:
        share *= pruning.rule.target_params or 1.0
    target_params(
        {layer: [1] * count for layer, count in moe.counts.items()},
        limits,
        params_per_expert=moe.params_per_expert,
        total_params=moe.num_parameters,
        target=share,
        uniform=rule.uniform,
    )


def check_batch(options: PretrainOptions, sizes: ParallelSizes) -> None:
    """
    Raises:
        SecateurError: the sequences of a micro-batch do not divide over the processes.
    """
    if options.batch_size % sizes.fsdp:
        raise SecateurError(
            f"--batch-size {options.batch_size} is for all processes together, expected a multiple of the {sizes.fsdp} "
            "that see different tokens (--fsdp)"
        )


def _check_devices(options: PretrainOptions, moe: MoEModel, sizes: ParallelSizes) -> None:
    """Refuse a split that the model or the batch does not allow."""
    check_split(moe, sizes)
    check_batch(options, sizes)
    for layer, count in moe.counts.items():
        if count % (options.rearrange_ranks or 1):
            raise SecateurError(
                f"--rearrange-ranks {options.rearrange_ranks}: layer {layer} has {count} experts, expected a multiple"
            )


def _check_times(options: PretrainOptions) -> None:
    """Refuse prunings that cannot come before the last step; windows are counted anew after each pruning."""
    window, step = options.window_steps, 0
    for pruning in options.prunings():
        if pruning.at_step is not None:
            step = max(step + 1, pruning.at_step)
        elif pruning.at_tokens is not None:
            tokens = pruning.at_tokens - step * tokens_per_step(options)
            step += window * max(1, -(-tokens // (window * tokens_per_step(options))))
        else:
            step += window * options.stable_windows
        if step >= options.steps:
            raise SecateurError(
                f"the pruning at {_when(pruning)} can be at step {step} at the earliest, expected before the end of "
                f"the run (--steps {options.steps}). Tokens are compared every --window-steps ({window}), loads can be "
                f"stable after --stable-windows ({options.stable_windows}) of them; --prune-at-step takes any step"
            )


def _try_optimizer(options: PretrainOptions, moe: MoEModel) -> float:
    """Bytes of optimizer state a byte of parameters, from one step on a small layer.

    Raises:
        SecateurError: transformers cannot make the optimizer or schedule, or LAEP cannot follow it.
    """
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise SecateurError("--precision fp16 needs a GPU, found none; bf16 and fp32 train on the CPU")
    if options.schedule in METRIC_SCHEDULES:
        raise SecateurError(f"--schedule {options.schedule} follows a validation metric; that is not supported")
    probe = torch.nn.Linear(64, 64, bias=False)
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output folder
        arguments = training_arguments(options, Path(folder))
        try:
            trainer = Trainer(model=probe, args=arguments, eval_dataset=[0])
            optimizer = trainer.create_optimizer()
            trainer.create_scheduler(options.steps, optimizer)
            probe.weight.grad = torch.ones_like(probe.weight)
            optimizer.step()
        except Exception as error:  # optimizers and loggers of other packages may raise anything
            raise SecateurError(f"transformers does not take these training settings: {error}") from error
    laep = LAEPCallback(prunings=options.prunings(), window_steps=options.window_steps, phase=options.phase())
    laep.check(moe.model, optimizer, arguments)
    return optimizer_state_bytes(optimizer) / (probe.weight.numel() * probe.weight.element_size())
