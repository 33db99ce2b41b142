"""What can happen to a process of a run at a chosen call of a function: hooks that are set before it begins."""

from __future__ import annotations

import importlib
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(original)` in the place of "module:name" or "module:Class.name"."""
    module, _, rest = target.partition(":")
    *parents, name = rest.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill:
    """Kill the process at the `nth` call of a function; `before` it, `after` it, or in the way that `how` says.

    With `where`, only calls count whose arguments it accepts: of a function that other code calls as well.
    """

    def __init__(
        self,
        target: str,
        nth: int = 1,
        when: str = "before",
        how: Callable[..., None] | None = None,
        where: Callable[..., bool] | None = None,
    ) -> None:
        self.target, self.nth, self.when, self.how, self.where = target, nth, when, how, where

    def __call__(self) -> None:
        calls = 0

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                is_meant = self.where is None or self.where(*args, **kwargs)
                calls += is_meant
                if not is_meant or calls != self.nth:
                    return original(*args, **kwargs)
                if self.how is not None:
                    self.how(original, *args, **kwargs)
                elif self.when == "after":
                    original(*args, **kwargs)
                return die()

            return counted

        replace(self.target, make)


class Signal:
    """Send a signal to this process before the `nth` call of a function, which then goes on."""

    def __init__(self, target: str, nth: int = 1, number: int = signal.SIGTERM) -> None:
        self.target, self.nth, self.number = target, nth, number

    def __call__(self) -> None:
        calls = 0

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def signalled(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == self.nth:
                    os.kill(os.getpid(), self.number)
                return original(*args, **kwargs)

            return signalled

        replace(self.target, make)


class LimitFileSize:
    """From the `nth` call on, no file can grow beyond `size`: writes end as on a full disk, with an OSError."""

    def __init__(self, target: str, nth: int, size: int) -> None:
        self.target, self.nth, self.size = target, nth, size

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        calls = 0

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def limited(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == self.nth:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
                return original(*args, **kwargs)

            return limited

        replace(self.target, make)


class AnotherPlan:
    """Decide otherwise than the other ranks do: drop nothing."""

    def __call__(self) -> None:
        replace("secateur.train.laep:decide", lambda decide: lambda stats, *args, **kwargs: _keep_all(stats))


def _keep_all(stats: Any) -> Any:
    from secateur.plans import Plan

    return Plan.identity({layer: len(loads) for layer, loads in stats.loads().items()})


@dataclass(frozen=True)
class OnRank:
    """A hook for one rank of a job, until torchrun restarts it."""

    rank: int
    hook: Callable[[], None]

    def __call__(self) -> None:
        if os.environ.get("RANK") == str(self.rank) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self.hook()
