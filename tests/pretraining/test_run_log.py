"""The numbers in the log of a run, by a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.pretraining.run_folder import RunFolder
from secateur.pretraining.run_log import RunLog
from secateur.train import training_log

ARGS: Any = None


def test_seconds_are_those_of_training_alone_and_add_up_from_where_the_run_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now.seconds)
    pruner = SimpleNamespace(
        last_window=None,
        events=[],
        phase="stable",
        phase_in_words="stable, regret 0.1%",
        unpruned=lambda: None,
        load_max_over_mean=None,
        moe=SimpleNamespace(num_parameters=7),
    )
    (tmp_path / "run.json").write_text("{}")
    folder, laep = RunFolder(tmp_path), SimpleNamespace(events=[], pruner=pruner)
    progress = SimpleNamespace(show=lambda *numbers: None, say=lambda text: None)
    log: Any = RunLog(
        folder, laep, progress, run="r", tokens_per_step=10, domain_sizes={}, seconds=50.0  # type: ignore[arg-type]
    )  # fmt: skip
    log.trainer = SimpleNamespace(log=lambda logs: None)
    control = SimpleNamespace(should_log=False)
    state = SimpleNamespace(global_step=0, max_steps=4)
    monkeypatch.setattr(folder, "write_events", lambda events: None)
    for step in (1, 2, 3, 4):
        log.on_step_begin(ARGS, state, control)
        now.seconds += 1.0
        state.global_step = step
        pruned = SimpleNamespace(
            surgery_seconds=0.5, describe=lambda: "", experts_after=[], parameters_after=7, rerouted_share=0.0
        )
        if step == 3:
            now.seconds += 0.5  # of surgery
            pruner.events.append(pruned)
        log.on_step_end(ARGS, state, control)
        if step in (2, 4):
            log.on_log(ARGS, state, control, logs={"loss": 2.0, "grad_norm": float("inf")})
            now.seconds += 100.0  # of evaluation and saving
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(line["step"], line["seconds"], line["tokens_per_second"]) for line in found] == [
        (2, 52.0, 10.0),
        (4, 54.0, 10.0),
    ]
    assert [line["grad_norm"] for line in found] == [None, None]
