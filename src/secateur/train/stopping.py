"""SIGTERM in the middle of a training: the step is finished, a checkpoint is written, then the signal takes its course.

Schedulers send it some time before they kill. transformers has an argument for it (`enable_jit_checkpoint`), which
saves in the middle of a step and on each rank by itself, so that the resumed run would be another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from secateur.files.records import Count, Finite, as_record
from secateur.train.distributed.launch import any_rank, rank, values_of_ranks, world_size
from secateur.train.training_log import StepClock

STATUS = 128 + signal.SIGTERM


class Unlogged(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a checkpoint: what each rank has summed up of its losses since the last log, which was at a step, and when.

    seconds: of the steps since then, as `clock` counts them; 0 also in checkpoints of an earlier release.
    """

    loss_sums: tuple[Finite, ...]
    last_logged_step: Count
    seconds: Finite = 0.0


class StopAtSignal(TrainerCallback, ExportableState):
    """Ends a training after the step in which SIGTERM came, on all ranks after the same one, with a checkpoint.

    Must come before other callbacks of ours in the Trainer's list, so that they know of the checkpoint. `trainer` is
    set once the Trainer exists. What has been trained on and not yet logged travels with every checkpoint: the Trainer
    logs means since the last log, and would begin a new one. So do the seconds of a `clock`, where there is one.

    Attributes:
        stopped: whether the training ended like that.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.clock: StepClock | None = None
        self.stopped = False
        self._asked = False
        self._unlogged: dict[str, Any] = {}

    @contextlib.contextmanager
    def listening(self, *, wanted: bool = True) -> Iterator[None]:
        """Hold SIGTERM back while it lasts; afterwards it goes to whoever had it before, if it came.

        A process that ignores SIGTERM goes on to do so. Python takes signals in the main thread only; in another one
        this does nothing.

        Raises:
            SystemExit: SIGTERM came, and who had it before wants the process to live.
        """
        before = signal.getsignal(signal.SIGTERM)
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not wanted or not is_main_thread or before in (signal.SIG_IGN, None):
            yield
            return
        signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._asked:
                self._pass_on()
        if self.stopped:
            raise SystemExit(STATUS)

    def _pass_on(self) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            if self.stopped and self.trainer is not None:
                error.add_note(f"checkpoint-{self.trainer.state.global_step} was written")
            raise

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored: Any = state.stateful_callbacks
        saved = stored.get(type(self).__name__)
        if not state.global_step or saved is None:
            return
        before = as_record(saved["attributes"], Unlogged, f"trainer_state.json: {type(self).__name__}")
        trainer: Any = self.trainer
        sums = before.loss_sums
        trainer._tr_loss += sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums)
        trainer._globalstep_last_logged = before.last_logged_step
        if self.clock is not None and before.seconds:
            self.clock.go_on_from(state.global_step - before.last_logged_step, before.seconds)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._asked = any_rank(self._asked)
        if self._asked:
            control.should_save = control.should_training_stop = self.stopped = True
        if control.should_save:
            trainer: Any = self.trainer
            is_logged = control.should_log or trainer._globalstep_last_logged == state.global_step
            self._unlogged = {
                "loss_sums": values_of_ranks(0.0 if is_logged else float(trainer._tr_loss)),
                "last_logged_step": state.global_step if is_logged else trainer._globalstep_last_logged,
                "seconds": 0.0 if is_logged else self._seconds(state.global_step),
            }

    def _seconds(self, step: int) -> float:
        return self.clock.so_far(step)[1] if self.clock is not None and self.clock.is_running else 0.0

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json` (transformers' ExportableState)."""
        return {"args": {}, "attributes": self._unlogged}
