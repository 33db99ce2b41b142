"""The options of a run as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from secateur.pretraining.options import PretrainOptions
from secateur.train.trainer_arguments import trainer_arguments


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


def tokens_per_step(options: PretrainOptions) -> int:
    """Tokens an optimizer step."""
    return options.batch_size * options.accumulation * options.sequence_length
