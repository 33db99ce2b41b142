"""Hand models to lm-eval, the Language Model Evaluation Harness, where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

PACKAGE = "lm_eval"


def check_installed() -> Any:
    """The package.

    Raises:
        SecateurError: it is not there.
    """
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise SecateurError(f"--lm-eval needs the package lm-eval, which is not installed ({error})") from error


def run_tasks(model: Path, tasks: Sequence[str], *, batch_size: int) -> dict[str, Any]:
    """{task: {metric: value}} of a model folder, loaded by lm-eval through transformers.

    Pruned models whose layers differ load there as well: importing Secateur has registered them.

    Raises:
        SecateurError: lm-eval is not installed, or refused a task.
    """
    harness = check_installed()
    arguments = {"pretrained": str(model), "dtype": "auto"}
    try:
        found = harness.simple_evaluate(model="hf", model_args=arguments, tasks=list(tasks), batch_size=batch_size)
    except (KeyError, ValueError) as error:
        raise SecateurError(f"--lm-eval {','.join(tasks)}: lm-eval refused: {error}") from error
    results: dict[str, Any] = found["results"]
    return {task: {name: _number(value) for name, value in metrics.items()} for task, metrics in results.items()}


def _number(value: Any) -> Any:
    """As JSON holds it: lm-eval also gives numbers of numpy."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
