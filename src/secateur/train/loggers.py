"""How a callback of the Trainer reaches its loggers, such as TensorBoard: transformers gives it no way of its own."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class Loggers:
    """The list of callbacks in which `callback` is, loggers among them; found once, by looking through what is alive.

    Where the callback is called by something else than a Trainer there are none, and the numbers go to the history.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._handler: Any = next(
            (
                one
                for one in gc.get_objects()
                if issubclass(type(one), CallbackHandler) and any(other is callback for other in one.callbacks)
            ),
            None,
        )

    def log(
        self, numbers: Mapping[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """As `Trainer.log`, which any callback may be called by at any step; the Trainer's own turn to log stays."""
        logs: dict[str, Any] = dict(numbers)
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        history: list[Any] = state.log_history
        history.append({**logs, "step": state.global_step})
        if self._handler is not None:
            is_due = control.should_log  # which any log takes back
            self._handler.on_log(args, state, control, logs)
            control.should_log = is_due
