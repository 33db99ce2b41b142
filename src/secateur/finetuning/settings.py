"""What a fine-tuning needs to know, in parts: each is for the rooms that need it, and no room needs all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned and what is measured on; see `FinetuneOptions`. seed: of how images are moved."""

    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    text_key: str
    split: str
    sequence_length: int | None
    augment: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What of the model is trained, and by which losses; see `FinetuneOptions`."""

    freeze: tuple[str, ...]
    router_aux_loss: float | None
    new_head: bool


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What is done in a step, and how often; see `FinetuneOptions`."""

    steps: int | None
    epochs: float | None
    batch_size: int
    gradient_accumulation: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    bf16: bool
    seed: int

    def num_steps(self, num_items: int) -> int:
        """Optimizer steps on data of so many sequences or images; the last step of an epoch may be a smaller one."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 1.0) * self.steps_per_epoch(num_items))

    def steps_per_epoch(self, num_items: int) -> int:
        return math.ceil(num_items / (self.batch_size * self.gradient_accumulation))

    def warmup_steps(self, steps: int) -> int:
        return math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """When what is recorded. options: all of them as they were given, for finetune.json."""

    options: Mapping[str, Any]
    log_steps: int
    eval_steps: int | None
    save_steps: int
    report_to: str


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """`FinetuneOptions` in parts."""

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    record: RecordSettings
