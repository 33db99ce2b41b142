"""Does the learning rate still rise? Read ahead from a schedule where that can be, else watched step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from secateur.errors import SecateurError
from secateur.surgery.trained_by import TrainedBy

MOST_READ = 10_000  # steps that are looked at, evenly spread over a longer run
TINY = 1e-6  # relative; a smaller rise is rounding


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a schedule does, in steps of the run.

    peak: the step with the highest learning rate. rises_again: the first step after it with a higher rate than the one
    before, None without any.
    """

    peak: int
    rises_again: int | None


def read_schedule(scheduler: Any, num_steps: int, *, done: int = 0) -> Schedule | None:
    """The schedule of a whole run; None for a scheduler whose rates depend on more than the step.

    Args:
        scheduler: torch's LambdaLR, which all of transformers' own schedules are. num_steps: of the run.
        done: steps of the run so far, at which the scheduler stands now.
    """
    if type(scheduler) is not LambdaLR:
        return None
    offset = scheduler.last_epoch - done
    spread = max(1, -(-num_steps // MOST_READ))
    steps = [*range(1, num_steps + 1, spread)]
    factors = [max(float(factor(max(0, step - 1 + offset))) for factor in scheduler.lr_lambdas) for step in steps]
    if not factors:
        return None
    peak = factors.index(max(factors))
    later = (i for i in range(peak + 1, len(factors)) if factors[i] > factors[i - 1] * (1 + TINY))
    again = next(later, None)
    return Schedule(peak=steps[peak], rises_again=None if again is None else steps[again])


class RateWatch:
    """The learning rates of an optimizer, looked at after every step."""

    def __init__(self, optimizer: torch.optim.Optimizer | TrainedBy) -> None:
        self._optimizer = optimizer
        self._before: list[float | None] | None = None
        self.rose = False

    @property
    def learning_rate(self) -> float | None:
        """The highest of all parameter groups; None where the optimizer sets its own, as Adafactor can."""
        return max((rate for rate in rates_of(self._optimizer) if rate is not None), default=None)

    def step(self) -> None:
        """Compare with the step before; `rose` stays true until `forget`."""
        now = rates_of(self._optimizer)
        if self._before is not None and len(self._before) == len(now):
            self.rose |= any(
                before is not None and rate is not None and rate > before * (1 + TINY)
                for before, rate in zip(self._before, now, strict=True)
            )
        self._before = now

    def forget(self) -> None:
        """A new window begins."""
        self.rose = False

    def state(self) -> dict[str, Any]:
        return {"rates": self._before, "rose": self.rose}

    def restore(self, rates: Sequence[float | None] | None, rose: bool) -> None:
        """Go on where `state` was taken."""
        self._before, self.rose = None if rates is None else list(rates), rose


def rates_of(optimizer: torch.optim.Optimizer | TrainedBy) -> list[float | None]:
    """The learning rate of each parameter group; None where the optimizer sets its own.

    Raises:
        SecateurError: a group has none, or one that is no number.
    """
    rates: list[float | None] = []
    for number, group in enumerate(optimizer.param_groups):
        rate = group.get("lr", "missing")
        if isinstance(rate, bool) or not isinstance(rate, int | float | torch.Tensor | None):
            raise SecateurError(
                f"optimizer: the learning rate ('lr') of parameter group {number} is {rate!r:.60}, expected a number: "
                "the stable phase is not looked for while it rises"
            )
        rates.append(None if rate is None else float(rate))
    return rates
