"""Schedules are read ahead where that can be, and watched where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from secateur.errors import SecateurError
from secateur.train.rates import RateWatch, Schedule, read_schedule

STEPS = 100


def optimizer(rate: Any = 1e-3, groups: int = 1) -> torch.optim.Optimizer:
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for _ in range(groups)]
    return torch.optim.SGD(parameters, lr=rate)


def scheduler(kind: str, **more: Any) -> Any:
    return get_scheduler(kind, optimizer(), num_warmup_steps=20, num_training_steps=STEPS, **more)


@pytest.mark.parametrize(
    ("kind", "more", "peak", "again"),
    [
        ("constant_with_warmup", {}, 21, None),
        ("cosine", {}, 21, None),
        ("linear", {}, 21, None),
        ("warmup_stable_decay", {"scheduler_specific_kwargs": {"num_decay_steps": 30}}, 21, None),
        ("cosine_with_restarts", {"scheduler_specific_kwargs": {"num_cycles": 2}}, 21, 61),
    ],
)
def test_a_schedule_is_known_ahead(kind: str, more: dict[str, Any], peak: int, again: int | None) -> None:
    assert read_schedule(scheduler(kind, **more), STEPS) == Schedule(peak=peak, rises_again=again)


def test_a_schedule_that_is_read_in_the_middle_of_a_run_is_the_same() -> None:
    made = scheduler("cosine")
    for _ in range(37):
        made.optimizer.step()
        made.step()
    assert read_schedule(made, STEPS, done=37) == Schedule(peak=21, rises_again=None)


def test_a_long_run_is_read_at_evenly_spread_steps() -> None:
    made = get_scheduler("cosine", optimizer(), num_warmup_steps=20_000, num_training_steps=1_000_000)
    found = read_schedule(made, 1_000_000)
    assert found is not None
    assert 20_001 <= found.peak < 20_101
    assert found.rises_again is None


def test_a_scheduler_that_depends_on_more_than_the_step_is_not_read() -> None:
    made = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer())
    assert read_schedule(made, STEPS) is None
    assert read_schedule(torch.optim.lr_scheduler.OneCycleLR(optimizer(), 1e-2, total_steps=STEPS), STEPS) is None


def test_rises_are_seen_in_any_group_until_they_are_forgotten() -> None:
    of = optimizer(groups=2)
    watch = RateWatch(of)
    seen = []
    for rates in ([1e-3, 1e-3], [1e-3, 1e-3], [1e-3, 2e-3], [1e-3, 1e-3], [5e-4, 1e-3]):
        for group, rate in zip(of.param_groups, rates, strict=True):
            group["lr"] = rate
        watch.step()
        seen.append(watch.rose)
    assert seen == [False, False, True, True, True]
    watch.forget()
    watch.step()
    assert not watch.rose
    assert watch.learning_rate == 1e-3


def test_a_rate_may_be_a_tensor_and_must_be_a_number() -> None:
    assert RateWatch(optimizer(torch.tensor(0.25))).learning_rate == 0.25
    own = optimizer()
    own.param_groups[0]["lr"] = None  # Adafactor with relative steps
    watch = RateWatch(own)
    watch.step()
    watch.step()
    assert (watch.learning_rate, watch.rose) == (None, False)
    for wrong in ("fast", True):
        own.param_groups[0]["lr"] = wrong
        with pytest.raises(SecateurError, match=r"'lr'\) of parameter group 0 is .*, expected a number"):
            watch.step()
    del own.param_groups[0]["lr"]
    with pytest.raises(SecateurError, match="'missing', expected a number"):
        watch.step()
