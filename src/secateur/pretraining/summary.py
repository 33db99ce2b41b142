"""summary.json: what a finished run came to."""

from __future__ import annotations

import json
import statistics
from typing import Any

from secateur.environment import peak_memory_bytes
from secateur.errors import SecateurError
from secateur.pretraining.run_folder import RunFolder


def run_summary(
    folder: RunFolder, *, steps: int, log_steps: int, tokens_per_step: int, parameters: int
) -> dict[str, Any]:
    """Content of summary.json, from the logs of a run that trained all its steps.

    Args:
        steps: all of them. log_steps: between two lines of a log. parameters: of the model at the end.

    Raises:
        SecateurError: the logs do not have the end of the run.
    """
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    events = json.loads(folder.events.read_text(encoding="utf-8"))
    first, last = (events[0]["step"], events[-1]["step"]) if events else (steps, steps)
    # The first interval has warm-up in it, and the one that holds a pruning is of both models.
    before = [line["tokens_per_second"] for line in train[1:] if line["step"] < first]
    after = [line["tokens_per_second"] for line in train if line["step"] >= last + log_steps]
    last_eval = folder.eval_at(steps)
    if last_eval is None:
        raise SecateurError(f"{folder.metrics}: found no validation after step {steps}, the last of the run")
    return {
        "finished": True,
        **last_eval,
        "tokens_per_second": {
            "before": statistics.median(before) if before else None,
            "after": statistics.median(after) if after and events else None,
        },
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": train[-1]["seconds"] if train else 0.0,
        "parameters": parameters,
        "peak_memory_bytes": peak_memory_bytes(),
    }
