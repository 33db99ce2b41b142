"""The settings of a run as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from secateur.errors import SecateurError
from secateur.train.options import PretrainOptions


def training_arguments(options: PretrainOptions, folder: Path) -> TrainingArguments:
    """Arguments of a Trainer whose checkpoints go to `folder`.

    Raises:
        SecateurError: a name that transformers does not know, or a combination that it does not take.
    """
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
            use_cpu=options.precision == "bf16" and not torch.accelerator.is_available(),  # bf16 asks for it in words
            activation_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            data_seed=options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            prediction_loss_only=True,
            logging_steps=options.log_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            save_strategy="steps",
            save_steps=options.save_steps,
            save_total_limit=2,
            report_to=options.report_to,
            disable_tqdm=True,
        )
    except (ValueError, ImportError) as error:
        raise SecateurError(f"transformers does not take these training settings: {error}") from error


def tokens_per_step(options: PretrainOptions) -> int:
    """Tokens an optimizer step."""
    return options.batch_size * options.accumulation * options.sequence_length
