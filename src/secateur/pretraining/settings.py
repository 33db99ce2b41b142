"""What a run needs to know, in parts: each is for the rooms that need it, and no room needs all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.train.phases import PhaseConstants
from secateur.train.rearrange import Rearrangement
from secateur.train.schedule import Pruning


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and by which tokens it reads; exactly one of preset, config and model is given."""

    preset: str | None
    config: str | None
    model: str | None
    overrides: Mapping[str, Any]
    tokenizer: str | None
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which texts, and how they are cut. seed: of the split."""

    data: tuple[str, ...]
    text_key: str
    sequence_length: int
    validation_share: float
    max_data_bytes: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What is done in a step, and how often. seed: of the weights and of the order of the data."""

    steps: int
    batch_size: int
    accumulation: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    optimizer: str
    max_grad_norm: float
    precision: str
    gradient_checkpointing: bool
    seed: int
    threads: int | None

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """How the run is spread over processes; see `train.distributed.load.parallel_sizes`."""

    fsdp: int | None
    ep: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class BalanceSettings:
    """What `attach_balance` takes: its kind, and the strength under the name that the kind has for it."""

    kind: str
    arguments: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What LAEP takes. prunings: the schedule, empty for none. rearrange: see `LAEP`."""

    prunings: tuple[Pruning, ...]
    window_steps: int
    phase: PhaseConstants
    rearrange: Rearrangement | bool | None

    @property
    def rearrange_ranks(self) -> int:
        """The ranks that were asked for to place experts on; 1 if none were."""
        return (self.rearrange.ranks or 1) if isinstance(self.rearrange, Rearrangement) else 1


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """When what is recorded. options: all of them as they were given, for run.json."""

    options: Mapping[str, Any]
    log_steps: int
    eval_steps: int
    save_steps: int
    report_to: str


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """`PretrainOptions`, parsed. control: of the control run, if there is one."""

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    devices: DeviceSettings
    balance: BalanceSettings
    pruning: PruningSettings
    record: RecordSettings
    control: RunSettings | None
