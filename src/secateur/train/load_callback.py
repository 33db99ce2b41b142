"""Watch the loads of a run that is not pruned: `Trainer(..., callbacks=[LoadCallback()])`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.observation.loads import CountMask
from secateur.train.laep import LAEP
from secateur.train.loggers import end_left_over, log, trainer_with


class LoadCallback(TrainerCallback):
    """Counts the tokens of each expert and gives `LAEP.numbers` to the Trainer's loggers whenever it logs.

    Nothing of the training changes, so any optimizer will do.

    Args:
        window_steps: optimizer steps a statistics window; the numbers are those of the last full one.
        by_layer: also log each layer. count_mask, on_message: as for `LAEP`.

    Raises:
        SecateurError: at the start of training, for a model whose experts cannot be counted.

    Attributes:
        pruner: the `LAEP` that watches, without a pruning; None before training starts.
    """

    def __init__(
        self,
        *,
        window_steps: int = 20,
        by_layer: bool = False,
        count_mask: CountMask | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self._laep: dict[str, Any] = {
            "window_steps": window_steps,
            "count_mask": count_mask,
            "on_message": on_message,
        }
        self._by_layer = by_layer
        self.pruner: LAEP | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is not None:
            self.pruner.detach()
        self._trainer = trainer_with(self)
        end_left_over(kwargs["model"], self._trainer)
        self.pruner = LAEP(kwargs["model"], kwargs["optimizer"], prunings=[], rearrange=False, **self._laep)
        self.pruner.trainer = None if self._trainer is None else weakref.ref(self._trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.pruner.step()
        if control.should_log:
            log(self.pruner.numbers(by_layer=self._by_layer), self._trainer, args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is not None:
            self.pruner.detach()
