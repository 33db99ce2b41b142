"""Records a run: metrics.jsonl, loads.jsonl, events.json, the progress bar, and the seal on every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from secateur.files.progress import Steps
from secateur.pretraining.run_folder import RunFolder, append_line, write_json
from secateur.train.callback import LAEPCallback
from secateur.train.laep import LAEP
from secateur.train.phases import NUMBERS
from secateur.train.training_log import TrainingLog, checkpoint_of, finite_or_none


class RunLog(TrainingLog):
    """Must come after `laep` in the Trainer's list of callbacks.

    Seconds are training seconds: evaluation, saving and surgery are not counted.
    """

    def __init__(
        self,
        folder: RunFolder,
        laep: LAEPCallback,
        progress: Steps,
        *,
        run: str,
        tokens_per_step: int,
        domain_sizes: Mapping[str, int],
        seconds: float = 0.0,
    ) -> None:
        super().__init__(run=run, on_progress=progress.show)
        self._folder = folder
        self._laep = laep
        self._progress = progress
        self._tokens_per_step = tokens_per_step
        self._domain_sizes = domain_sizes
        self._seconds = seconds
        self._domain_losses: dict[str, float] = {}
        self._num_events = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_events = len(self._laep.events)
        self._folder.write_events(self._laep.events)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._folder.require_there()  # else a checkpoint would make it again, without what it began with
        super().on_step_end(args, state, control, **kwargs)
        pruner = self._laep.pruner
        assert pruner is not None
        step = state.global_step
        if pruner.last_window is not None:
            self._record_window(pruner, step)
        if len(pruner.events) > self._num_events:
            self._num_events = len(pruner.events)
            event = pruner.events[-1]
            self.clock.leave_out(event.surgery_seconds)
            self._folder.write_events(pruner.events)
            self._progress.say(event.describe())

        if step == state.max_steps and (unpruned := pruner.unpruned()) is not None:
            write_json(self._folder.unpruned, unpruned.to_json())

    def _record_window(self, pruner: LAEP, step: int) -> None:
        """The loads of the window that `step` ended, and the phase as of it."""
        assert pruner.last_window is not None
        numbers = {name: getattr(pruner.report, name) for name in NUMBERS}
        line: dict[str, Any] = {"step": step, "tokens": step * self._tokens_per_step}
        line |= {"learning_rate": pruner.learning_rate, "rises": pruner.rises, "ahead": pruner.ahead}
        line |= {"phase": pruner.report.phase, **numbers}
        line["layers"] = {str(layer): loads for layer, loads in pruner.last_window.loads().items()}
        append_line(self._folder.loads, line)

    def record(self, logs: Mapping[str, float], step: int) -> str:
        if not self.clock.is_running:
            return ""
        pruner = self._laep.pruner
        assert pruner is not None
        steps, elapsed = self.clock.stop(step)
        tokens_per_second = steps * self._tokens_per_step / elapsed
        self._seconds += elapsed
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
                "grad_norm": finite_or_none(logs.get("grad_norm")),
                "tokens_per_second": tokens_per_second,
                "phase": pruner.phase,
                "load_max_over_mean": spread,
                "parameters": pruner.moe.num_parameters,
            },
        )
        load = "" if spread is None else f"  load max/mean {spread:.1f}"
        return f"loss {logs['loss']:.3f}  {tokens_per_second:,.0f} tok/s  {pruner.phase_in_words}{load}"

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
        line = {"kind": "eval", "step": step, "tokens": step * self._tokens_per_step, "seconds": self._seconds}
        line |= {"validation_loss": mean, "validation_loss_by_domain": losses}
        append_line(self._folder.metrics, line)
        self._progress.say(f"step {step}: validation loss {mean:.4f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._folder.flush_logs()  # a whole checkpoint never has fewer lines than its step
        self._folder.note_digests(checkpoint_of(args, state))
        super().on_save(args, state, control, **kwargs)
