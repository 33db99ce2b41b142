"""Every setting of a fine-tuning, as one value that is recorded with the result."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from secateur.errors import SecateurError
from secateur.files.limits import SHOWN
from secateur.finetuning.settings import (
    DataSettings,
    FinetuneSettings,
    ModelSettings,
    RecordSettings,
    TrainingSettings,
)
from secateur.train.parts import part_of

# our name -> that of transformers
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# setting -> the least that it may be
LEAST = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "sequence_length": 2,
    "log_steps": 1,
    "eval_steps": 1,
    "save_steps": 0,
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "router_aux_loss": 0,
    "seed": 0,
}
OPTIMIZERS = ("adamw", "sgd")
MAX_SEED = 2**32  # of NumPy
# what a model reads -> the settings that are for the others
NOT_FOR = {
    "images": ("sequence_length", "text_key", "split", "router_aux_loss"),
    "text": ("new_head", "augment"),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The command line has one option for each, with the same default.

    Args:
        data: text specs (see `data.corpus.read_documents`; .jsonl of chats too), or the folder or .npz of images.
        eval_data: the same, to measure the loss on; domains are told apart.
        steps, epochs: one of the two; one epoch without either.
        optimizer: "adamw", or "sgd" with a momentum of 0.9.
        warmup: a share of the steps below 1, from 1 on a number of steps.
        sequence_length: tokens of a sequence; 512, or what the model can take if that is less, without it.
        freeze: regular expressions; parameters in whose name one is found stay as they are.
        router_aux_loss: weight of a balance loss, in place of what the model's config says; 0 for none.
        new_head: of an image model: a new classifier, of zeros, for the classes of the data.
        augment: images are moved by up to an eighth of their sides and every second one is flipped.
        eval_steps: steps between measurements; without it only before the first step and after the last.
        save_steps: steps between checkpoints; 0 for none.

    Raises:
        SecateurError: a value out of its range, or two that contradict each other.
    """

    data: tuple[str, ...]
    eval_data: tuple[str, ...] = ()
    text_key: str = "text"
    split: str = "train"
    sequence_length: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    freeze: tuple[str, ...] = ()
    router_aux_loss: float | None = None
    new_head: bool = False
    augment: bool = False
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 500
    report_to: str = "none"

    def __post_init__(self) -> None:
        if not self.data:
            raise SecateurError("nothing to train on: name text or images with --data")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise SecateurError(f"{option(name)}: found {value!r:.{SHOWN}}, expected at least {least}")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SecateurError(f"{option(name)}: found {value!r:.{SHOWN}}, expected a number above 0")
        if self.steps is not None and self.epochs is not None:
            raise SecateurError("--steps and --epochs: give one of the two")
        if self.seed >= MAX_SEED:
            raise SecateurError(f"--seed: found {self.seed!r:.{SHOWN}}, expected less than 2**32")
        if self.optimizer not in OPTIMIZERS:
            raise SecateurError(f"--optimizer {self.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise SecateurError(f"--schedule {self.schedule}: expected one of {', '.join(SCHEDULES)}")
        if self.eval_steps is not None and not self.eval_data:
            raise SecateurError("--eval-steps needs --eval-data to measure on")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SecateurError(f"--freeze {pattern}: not a regular expression ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """All settings; lists for tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def num_steps(self, num_items: int) -> int:
        """See `TrainingSettings`, as of the two below."""
        return part_of(TrainingSettings, self).num_steps(num_items)

    def steps_per_epoch(self, num_items: int) -> int:
        return part_of(TrainingSettings, self).steps_per_epoch(num_items)

    def warmup_steps(self, steps: int) -> int:
        return part_of(TrainingSettings, self).warmup_steps(steps)


def in_parts(options: FinetuneOptions) -> FinetuneSettings:
    """The options as a fine-tuning is given them."""
    return FinetuneSettings(
        data=part_of(DataSettings, options),
        model=part_of(ModelSettings, options),
        training=part_of(TrainingSettings, options),
        record=RecordSettings(
            options=options.to_json(),
            log_steps=options.log_steps,
            eval_steps=options.eval_steps,
            save_steps=options.save_steps,
            report_to=options.report_to,
        ),
    )


def check_modality(options: FinetuneOptions, modality: str, model_type: str) -> None:
    """Refuse settings of images for a model that reads text, and the other way round.

    Args:
        modality: "text" or "images", see `model_folder.read.modality`.

    Raises:
        SecateurError: names the first one that was given.
    """
    defaults = {option.name: option.default for option in fields(options)}
    for name in NOT_FOR[modality]:
        if getattr(options, name) != defaults[name]:
            raise SecateurError(f"{option(name)}: a {model_type!r} model reads {modality}; leave it out")


def option(name: str) -> str:
    """How a setting is written on the command line."""
    return f"--{name.replace('_', '-')}"
