"""summary.json: what a finished run came to."""

from __future__ import annotations

from typing import Any

from secateur.environment import peak_memory_bytes
from secateur.errors import SecateurError
from secateur.pretraining.run_folder import RunFolder
from secateur.reporting.numbers import known_median
from secateur.reporting.run_files import TrainPoint, read_metrics
from secateur.surgery.events import read_events


def run_summary(
    folder: RunFolder, *, steps: int, log_steps: int, tokens_per_step: int, parameters: int
) -> dict[str, Any]:
    """Content of summary.json, from the logs of a run that trained all its steps.

    Args:
        steps: all of them. log_steps: between two lines of a log. parameters: of the model at the end.

    Raises:
        SecateurError: the logs do not have the end of the run.
    """
    train = [point for _, point in read_metrics(folder.metrics) if isinstance(point, TrainPoint)]
    changes = [event.step for event, _ in read_events(folder.events)]
    first, last = (changes[0], changes[-1]) if changes else (steps, steps)
    # The first interval has warm-up in it, and the one that holds a pruning is of both models.
    before = [point.tokens_per_second for point in train[1:] if point.step < first]
    after = [point.tokens_per_second for point in train if changes and point.step >= last + log_steps]
    last_eval = folder.eval_at(steps)
    if last_eval is None:
        raise SecateurError(f"{folder.metrics}: found no validation after step {steps}, the last of the run")
    return {
        "finished": True,
        **last_eval,
        "tokens_per_second": {
            "before": known_median(before),
            "after": known_median(after),
        },
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": train[-1].seconds if train else 0.0,
        "parameters": parameters,
        "peak_memory_bytes": peak_memory_bytes(),
    }
