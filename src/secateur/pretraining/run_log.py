"""Records a run: metrics.jsonl, loads.jsonl, events.json, the progress bar, and the seal on every checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import SecateurError
from secateur.pretraining.run_folder import RunFolder, append_line
from secateur.train.callback import LAEPCallback
from secateur.train.checkpoints import seal
from secateur.train.progress import RunProgress


class RunLog(TrainerCallback):
    """Must come after `laep` in the Trainer's list of callbacks. `trainer` is set once the Trainer exists.

    Seconds are training seconds: evaluation, saving and surgery are not counted.
    """

    def __init__(
        self,
        folder: RunFolder,
        laep: LAEPCallback,
        progress: RunProgress,
        *,
        run: str,
        tokens_per_step: int,
        domain_sizes: Mapping[str, int],
        seconds: float = 0.0,
    ) -> None:
        self._folder = folder
        self._laep = laep
        self._progress = progress
        self._run = run
        self._tokens_per_step = tokens_per_step
        self._domain_sizes = domain_sizes
        self._seconds = seconds
        self._mark = 0.0
        self._marked_step: int | None = None
        self._domain_losses: dict[str, float] = {}
        self._num_events = 0
        self.trainer: Trainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_events = len(self._laep.events)
        self._folder.write_events(self._laep.events)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._marked_step is None:
            self._mark, self._marked_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pruner = self._laep.pruner
        assert pruner is not None
        step = state.global_step
        self._progress.step(step)
        if pruner.last_window is not None:
            layers = {str(layer): loads for layer, loads in pruner.last_window.loads().items()}
            append_line(self._folder.loads, {"step": step, "tokens": step * self._tokens_per_step, "layers": layers})
        if len(pruner.events) > self._num_events:
            self._num_events = len(pruner.events)
            event = pruner.events[-1]
            self._mark += event.surgery_seconds
            self._folder.write_events(pruner.events)
            self._progress.say(event.describe())
            assert self.trainer is not None
            log_is_due = control.should_log  # which any log takes back
            self.trainer.log(
                {
                    "laep/experts": event.experts_after,
                    "laep/parameters": event.parameters_after,
                    "laep/rerouted_share": event.rerouted_share,
                }
            )
            control.should_log = log_is_due

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._marked_step is None:
            return
        step, pruner = state.global_step, self._laep.pruner
        assert pruner is not None
        check_finite("training", logs["loss"], step)
        elapsed = time.perf_counter() - self._mark
        tokens_per_second = (step - self._marked_step) * self._tokens_per_step / elapsed
        self._seconds += elapsed
        self._marked_step = None
        spread = pruner.load_max_over_mean
        append_line(
            self._folder.metrics,
            {
                "kind": "train",
                "step": step,
                "tokens": step * self._tokens_per_step,
                "seconds": self._seconds,
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": _finite(logs.get("grad_norm")),
                "tokens_per_second": tokens_per_second,
                "phase": pruner.phase,
                "load_max_over_mean": spread,
                "parameters": pruner.moe.num_parameters,
            },
        )
        load = "" if spread is None else f"  load max/mean {spread:.1f}"
        self._progress.numbers(step, f"loss {logs['loss']:.3f}  {tokens_per_second:,.0f} tok/s  {pruner.phase}{load}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for domain in self._domain_sizes:
            if metrics is not None and f"eval_{domain}_loss" in metrics:
                self._domain_losses[domain] = metrics[f"eval_{domain}_loss"]
        if set(self._domain_losses) != set(self._domain_sizes):
            return
        total = sum(self._domain_sizes.values())
        mean = sum(self._domain_losses[domain] * size for domain, size in self._domain_sizes.items()) / total
        losses, self._domain_losses = self._domain_losses, {}
        step = state.global_step
        check_finite("validation", mean, step)
        line = {"kind": "eval", "step": step, "tokens": step * self._tokens_per_step, "seconds": self._seconds}
        line |= {"validation_loss": mean, "validation_loss_by_domain": losses}
        append_line(self._folder.metrics, line)
        self._progress.say(f"step {step}: validation loss {mean:.4f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._folder.flush_logs()  # a whole checkpoint never has fewer lines than its step
        seal(self._folder.checkpoints / f"checkpoint-{state.global_step}", self._run)


def check_finite(which: str, loss: float, step: int) -> None:
    """Raises SecateurError: the loss is no number."""
    if not math.isfinite(loss):
        raise SecateurError(
            f"the {which} loss is {loss} at step {step}: the run has diverged (try a lower --learning-rate); "
            "checkpoints from before are untouched"
        )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; with fp16 the first gradient norms are often infinite."""
    return value if value is not None and math.isfinite(value) else None
