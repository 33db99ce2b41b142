"""Hand models to lm-eval, the Language Model Evaluation Harness, where it is installed."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.seen import Seen

PACKAGE = "lm_eval"
MODELS = f"{PACKAGE}.models.huggingface"  # where its class for models of transformers is
TASKS = f"{PACKAGE}.tasks"  # where its class that finds tasks is, which looks for all of them


@dataclass(frozen=True, kw_only=True)
class TaskRuns:
    """What the tasks of one model gave.

    results: {task: {metric: value}}, a group of tasks under the names of its parts too. failures: {task as it was asked
    for: why it has no result}.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def check_installed() -> Any:
    """The package.

    Raises:
        SecateurError: it is not there.
    """
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise SecateurError(f"--lm-eval needs the package lm-eval, which is not installed ({error})") from error


def run_tasks(model: Path, tasks: Sequence[str], *, batch_size: int, device: str, seen: Seen) -> TaskRuns:
    """Run the tasks one after another on a model folder that lm-eval loads once, through transformers.

    Pruned models whose layers differ load there as well: importing Secateur has registered them. A task that fails,
    whatever the reason, takes nothing from the others. It has failed, too, where a file of the model was changed by its
    end.

    Args:
        tasks: names that lm-eval knows, or .yaml files of its form. device: where the model runs.
        seen: the files of the model as they were at first.

    Raises:
        SecateurError: lm-eval is not installed.
    """
    harness = check_installed()
    runs = TaskRuns()
    loaded: Any = None
    with _noted(runs, tasks, f"lm-eval cannot load {model}"):
        known = importlib.import_module(TASKS).TaskManager()
        loaded = importlib.import_module(MODELS).HFLM(
            pretrained=str(model), dtype="auto", batch_size=batch_size, device=device
        )
    for task in tasks if loaded is not None else ():
        with _noted(runs, [task], "lm-eval cannot run it"):
            found = harness.simple_evaluate(
                model=loaded, tasks=[task], batch_size=batch_size, device=device, task_manager=known
            )
            seen.check(advice="run it again")
            for name, metrics in found["results"].items():
                runs.results[name] = {metric: _number(value) for metric, value in metrics.items()}
    del loaded
    gc.collect()
    return runs


@contextmanager
def _noted(runs: TaskRuns, tasks: Sequence[str], what: str) -> Iterator[None]:
    """Whatever another package raises is the failure of these tasks; it may also want to end the process."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{what}: {type(error).__name__}: {error}".split())
        runs.failures.update(dict.fromkeys(tasks, reason[:500]))


def _number(value: Any) -> Any:
    """As JSON holds it: lm-eval also gives numbers of numpy."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
