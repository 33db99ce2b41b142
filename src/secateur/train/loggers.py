"""How a callback reaches its Trainer, and the loggers in the Trainer's list: transformers hands it neither."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.families import without_adapters
from secateur.train.laep import watcher_of


def trainer_with(callback: TrainerCallback) -> Trainer | None:
    """The Trainer in whose list of callbacks this one is, found by looking through what is alive; None without one."""
    for one in gc.get_objects():
        if issubclass(type(one), Trainer):
            handler = getattr(one, "callback_handler", None)
            if handler is not None and any(other is callback for other in handler.callbacks):
                found: Trainer = one
                return found
    return None


def end_left_over(model: nn.Module, trainer: Trainer | None) -> None:
    """End the LAEP that the callback of another Trainer has on a model: its training was interrupted.

    Two callbacks of one Trainer are a mistake, and so is one beside a LAEP of the script's own: LAEP itself refuses.
    """
    left = watcher_of(without_adapters(model))
    if left is not None and left.trainer is not None and left.trainer() is not trainer:
        left.detach()


def log(
    numbers: Mapping[str, float],
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> None:
    """As `Trainer.log`, at any step; the Trainer's own turn to log stays, and what a subclass gathers for it.

    Without a Trainer there are no loggers, and the numbers go to the history alone.
    """
    logs: dict[str, Any] = dict(numbers)
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    history: list[Any] = state.log_history
    history.append({**logs, "step": state.global_step})
    if trainer is not None:
        is_due = control.should_log  # which any log takes back
        trainer.callback_handler.on_log(args, state, control, logs)
        control.should_log = is_due
