"""What Secateur calls of lm-eval 0.4, for machines without it: the same names, parameters and demands on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


class HFLM:
    """A model of transformers; `pretrained` is a folder."""

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = "cuda",
        dtype: str | torch.dtype | None = "auto",
        batch_size: int | str | None = 1,
    ) -> None:
        assert isinstance(device, str)
        assert isinstance(pretrained, str)
        assert isinstance(batch_size, int | str)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype).to(device)
        self.folder = pretrained


class TaskManager:
    """Knows which tasks there are."""


def install(monkeypatch: pytest.MonkeyPatch, run: Callable[[str, HFLM], dict[str, Any]]) -> list[dict[str, Any]]:
    """Put it in the place of the package; `run` gives the metrics of a task. The calls of `simple_evaluate`."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(
        model: HFLM,
        model_args: dict[str, Any] | None = None,
        tasks: list[str] | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        task_manager: TaskManager | None = None,
    ) -> dict[str, Any]:
        assert isinstance(model, HFLM)
        assert isinstance(task_manager, TaskManager)
        calls.append({"folder": model.folder, "tasks": tasks, "batch_size": batch_size, "device": device})
        return {"results": {task: run(task, model) for task in tasks or ()}}

    members = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in members.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls
