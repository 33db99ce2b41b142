"""The settings of a run as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from secateur.pretraining.settings import RecordSettings, TrainingSettings
from secateur.train.trainer_arguments import trainer_arguments


def training_arguments(
    training: TrainingSettings, record: RecordSettings, folder: Path, *, data_ranks: int = 1
) -> TrainingArguments:
    """Arguments of a Trainer whose checkpoints go to `folder`; `data_ranks` of its processes share each micro-batch.

    Raises:
        SecateurError: a name that transformers does not know, or a combination that it does not take.
    """
    return trainer_arguments(
        folder,
        precision=training.precision,
        seed=training.seed,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size // data_ranks,
        per_device_eval_batch_size=training.batch_size // data_ranks,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        optim=training.optimizer,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.gradient_checkpointing,
        prediction_loss_only=True,
        logging_steps=record.log_steps,
        eval_strategy="steps",
        eval_steps=record.eval_steps,
        save_strategy="steps",
        save_steps=record.save_steps,
        report_to=record.report_to,
    )
