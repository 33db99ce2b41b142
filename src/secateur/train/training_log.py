"""What every training here does on the way: time steps, tell of them, stop at a loss that is no number, seal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import SecateurError
from secateur.train.checkpoints import seal

# called with (steps done, steps in all, "" or the newest numbers)
Progress = Callable[[int, int, str], None]


class StepClock:
    """Steps, and seconds from the begin of a step on, until it is stopped."""

    def __init__(self) -> None:
        self._started: tuple[int, float] | None = None
        self._before = 0, 0.0

    @property
    def is_running(self) -> bool:
        return self._started is not None

    def start(self, step: int) -> None:
        """Begin to count at `step` steps done, unless it is counting already."""
        if self._started is None:
            self._started = step, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count so many of the seconds since it was started."""
        assert self._started is not None
        step, began = self._started
        self._started = step, began + seconds

    def go_on_from(self, steps: int, seconds: float) -> None:
        """Add to the next count what was counted before a checkpoint."""
        self._before = steps, seconds

    def so_far(self, step: int) -> tuple[int, float]:
        """(steps, seconds) since it was started, with those from before a checkpoint."""
        assert self._started is not None
        (first, began), (steps, seconds) = self._started, self._before
        return steps + step - first, seconds + time.perf_counter() - began

    def stop(self, step: int) -> tuple[int, float]:
        """`so_far`, for the last time."""
        counted = self.so_far(step)
        self._started, self._before = None, (0, 0.0)
        return counted


class TrainingLog(TrainerCallback):
    """The common part of the logs of `secateur pretrain` and `secateur finetune`; checkpoints are sealed as of `run`.

    Attributes:
        clock: runs from the begin of a step on; what stops it is up to the training.
    """

    def __init__(self, *, run: str, on_progress: Progress) -> None:
        self._run = run
        self._on_progress = on_progress
        self.clock = StepClock()

    def record(self, logs: Mapping[str, float], step: int) -> str:
        """Keep what the Trainer logged of the training at `step`; returns the numbers that a person sees, or ""."""
        raise NotImplementedError

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.start(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._on_progress(state.global_step, state.max_steps, "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        for key, value in logs.items():
            if key in ("loss", "train_loss") or (key.startswith("eval_") and key.endswith("_loss")):
                check_finite("validation" if key.startswith("eval_") else "training", value, state.global_step)
        if "loss" in logs and (numbers := self.record(logs, state.global_step)):
            self._on_progress(state.global_step, state.max_steps, numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seal(checkpoint_of(args, state), self._run)


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that the Trainer writes after this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def check_finite(which: str, loss: float, step: int) -> None:
    """Raises SecateurError: the loss is no number."""
    if not math.isfinite(loss):
        raise SecateurError(
            f"the {which} loss is {loss} at step {step}: the run has diverged (try a lower --learning-rate); "
            "checkpoints from before are untouched"
        )


def finite_or_none(value: float | None) -> float | None:
    """JSON has no infinity; with fp16 the first gradient norms are often infinite."""
    return value if value is not None and math.isfinite(value) else None
