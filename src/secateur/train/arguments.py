"""The settings of a run as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from secateur.errors import SecateurError
from secateur.train.distributed.launch import world_size
from secateur.train.options import PretrainOptions


def training_arguments(options: PretrainOptions, folder: Path, *, data_ranks: int = 1) -> TrainingArguments:
    """Arguments of a Trainer whose checkpoints go to `folder`; `data_ranks` of its processes share each micro-batch.

    Raises:
        SecateurError: a name that transformers does not know, or a combination that it does not take.
    """
    return trainer_arguments(
        folder,
        precision=options.precision,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size // data_ranks,
        per_device_eval_batch_size=options.batch_size // data_ranks,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.schedule,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        optim=options.optimizer,
        max_grad_norm=options.max_grad_norm,
        activation_checkpointing=options.gradient_checkpointing,
        prediction_loss_only=True,
        logging_steps=options.log_steps,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        report_to=options.report_to,
    )


def trainer_arguments(folder: Path, *, precision: str, seed: int, **fields: Any) -> TrainingArguments:
    """What every training here has in common, and `fields`, as transformers names them.

    Args:
        precision: fp32, bf16 or fp16.

    Raises:
        SecateurError: see `training_arguments`.
    """
    try:
        return TrainingArguments(
            output_dir=str(folder),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            # bf16 and a job of several processes ask for it in words
            use_cpu=not torch.accelerator.is_available() and (precision == "bf16" or world_size() > 1),
            ddp_backend="gloo" if world_size() > 1 and not torch.accelerator.is_available() else None,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            save_total_limit=2,
            log_level_replica="passive",  # ranks other than 0 would go back to the default
            disable_tqdm=True,
            **fields,
        )
    except (ValueError, ImportError) as error:
        raise SecateurError(f"transformers does not take these training settings: {error}") from error


def tokens_per_step(options: PretrainOptions) -> int:
    """Tokens an optimizer step."""
    return options.batch_size * options.accumulation * options.sequence_length
