"""transformers' Trainer for a fine-tuning: what a checkpoint holds, and what is counted and told on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import EvalLoopOutput

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_object
from secateur.files.records import Count, Finite, as_record
from secateur.files.refused import refused_by_the_disk
from secateur.files.safetensors_header import read_header
from secateur.finetuning.task import Task
from secateur.train.distributed.trainer import ResumableTrainer
from secateur.train.resumed import fitting
from secateur.train.training_log import Progress, TrainingLog

WEIGHTS, SPENT = "weights.safetensors", "spent.json"


@dataclass
class TrainingTime:
    """What the steps of a run took, those before it was resumed too.

    items: sequences or images trained on. seconds: from the begin of a step, when its data is there, to its end.
    """

    items: Count = 0
    seconds: Finite = 0.0


def read_spent(path: Path) -> TrainingTime:
    """What lies in a checkpoint.

    Raises:
        SecateurError: no such file, or something else in it.
    """
    return as_record(read_object(path), TrainingTime, str(path))


class FinetuneTrainer(ResumableTrainer):
    """Checkpoints hold the weights as they are in memory: a model folder would store some experts one by one."""

    def __init__(self, *, spent: TrainingTime, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._spent = spent

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self._spent.items += len(inputs["labels"])
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Without the router's losses, which transformers adds to that of the labels in evaluation too."""
        model: Any = self.model
        config = model.config.get_text_config()
        asked = getattr(config, "output_router_logits", None)
        if asked:
            config.output_router_logits = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if asked:
                config.output_router_logits = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        with refused_by_the_disk(folder / WEIGHTS):
            save_model(model, str(folder / WEIGHTS))
        atomic_write(folder / SPENT, json.dumps(asdict(self._spent)) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        mine: Any = self.model
        file = Path(resume_from_checkpoint) / WEIGHTS
        read_header(file)
        with fitting(file):
            load_model(mine, file)
        before = read_spent(Path(resume_from_checkpoint) / SPENT)
        self._spent.items, self._spent.seconds = before.items, before.seconds


class FinetuneLog(TrainingLog):
    """Counts the seconds of steps, from their begin to their end; the Trainer itself keeps the losses."""

    def __init__(
        self, task: Task, *, run: str, steps_per_epoch: int, spent: TrainingTime, on_progress: Progress
    ) -> None:
        super().__init__(run=run, on_progress=on_progress)
        self._task, self._steps_per_epoch, self._spent = task, steps_per_epoch, spent

    def record(self, logs: Mapping[str, float], step: int) -> str:
        return f"loss {logs['loss']:.3f}"

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task.set_epoch(state.global_step // self._steps_per_epoch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _, seconds = self.clock.stop(state.global_step)
        self._spent.seconds += seconds
        super().on_step_end(args, state, control, **kwargs)


def check_logger(name: str) -> None:
    """Refuse a logger that transformers does not know, or whose package is missing.

    Raises:
        SecateurError: it is one of these.
    """
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise SecateurError(
            f"--report-to {name}: expected none, all or one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
        )
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except (ImportError, RuntimeError) as error:
        raise SecateurError(f"--report-to {name}: {error}") from error


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of images whose class was named, of a Trainer's EvalPrediction with `best_class` before it."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def best_class(logits: Any, labels: Any) -> Any:
    """(B,) of what an image model puts out: its logits (B, classes), and more."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
