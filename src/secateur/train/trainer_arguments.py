"""The settings of a run as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from secateur.errors import SecateurError
from secateur.train.distributed.launch import world_size


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
