"""What the logs of all trainings have in common: the clock of steps, losses that are no number, and seals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.train import checkpoints, training_log
from secateur.train.training_log import StepClock, TrainingLog, finite_or_none


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: clock.seconds)
    return clock


class Log(TrainingLog):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.numbers = "loss 2"
        super().__init__(run="this run", on_progress=lambda *done: self.seen.append(done))

    def record(self, logs: Mapping[str, float], step: int) -> str:
        self.seen.append((step, dict(logs)))
        return self.numbers


STATE: Any = SimpleNamespace(global_step=3, max_steps=9)


def test_a_clock_counts_from_its_first_start_without_what_is_left_out(now: SimpleNamespace) -> None:
    clock = StepClock()
    assert not clock.is_running
    clock.start(4)
    now.seconds += 2
    clock.start(5)  # it is running
    now.seconds += 5
    clock.leave_out(3)
    assert clock.stop(6) == (2, 4.0)
    assert not clock.is_running
    clock.start(6)
    now.seconds += 1
    assert clock.stop(7) == (1, 1.0)


def test_a_clock_goes_on_from_what_was_counted_before_a_checkpoint(now: SimpleNamespace) -> None:
    clock = StepClock()
    clock.go_on_from(3, 6.0)
    clock.start(7)
    now.seconds += 2
    assert clock.so_far(8) == clock.so_far(8) == (4, 8.0)
    assert clock.stop(8) == (4, 8.0)
    clock.start(8)
    now.seconds += 1
    assert clock.stop(9) == (1, 1.0)


@pytest.mark.parametrize(
    ("key", "which"), [("loss", "training"), ("train_loss", "training"), ("eval_code_loss", "validation")]
)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training_before_it_is_recorded(key: str, which: str, loss: float) -> None:
    log = Log()
    with pytest.raises(SecateurError, match=rf"the {which} loss is {loss} at step 3: the run has diverged"):
        log.on_log(None, STATE, None, logs={"loss": 2.0, key: loss})
    assert log.seen == []


def test_other_numbers_may_be_infinite_and_logs_without_a_loss_are_not_recorded() -> None:
    log = Log()
    log.on_log(None, STATE, None, logs={"grad_norm": float("inf"), "eval_code_loss": 2.0, "eval_runtime": float("nan")})
    log.on_log(None, STATE, None, logs=None)
    assert log.seen == []


def test_progress_is_told_after_every_step_and_with_the_numbers_of_a_log() -> None:
    log = Log()
    log.on_step_end(None, STATE, None)
    log.on_log(None, STATE, None, logs={"loss": 2.0})
    log.numbers = ""
    log.on_log(None, STATE, None, logs={"loss": 1.0})
    assert log.seen == [(3, 9, ""), (3, {"loss": 2.0}), (3, 9, "loss 2"), (3, {"loss": 1.0})]


def test_a_saved_checkpoint_is_sealed_as_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"w")
    Log().on_save(SimpleNamespace(output_dir=str(tmp_path)), STATE, None)
    assert checkpoints.last_whole(tmp_path, "this run") == tmp_path / "checkpoint-3"
    with pytest.raises(SecateurError, match="another run"):
        checkpoints.last_whole(tmp_path, "that run")


def test_json_gets_none_for_what_is_no_number() -> None:
    assert [finite_or_none(value) for value in (1.5, None, float("inf"), float("nan"))] == [1.5, None, None, None]
