"""Call a function on many inputs in forked children that are killed when they take too long or too much memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import SecateurError

SECONDS = 5.0  # of CPU time for one input
MEMORY = 300 * 2**20  # bytes above what the process had
ADDRESSES = 3 * 2**30  # bytes of address space above it; what asks for more gets a MemoryError
WAIT = 180.0  # seconds of the clock for one input, which a reader that waits for a pipe does not spend of the CPU

Kind = Literal["read", "refused", "uncaught", "hang", "memory", "died"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one input: message is the error's, or the last lines of the traceback."""

    kind: Kind
    message: str = ""
    seconds: float = 0.0
    num_bytes: int = 0


def outcomes(
    read: Callable[[Any], object], inputs: Sequence[Any], refusals: tuple[type[Exception], ...] = (SecateurError,)
) -> list[Outcome]:
    """Call `read` on each input; a child goes on after the one that killed the last."""
    found: list[Outcome] = []
    context = multiprocessing.get_context("fork")
    while len(found) < len(inputs):
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(read, inputs[len(found) :], there, refusals))
        child.start()
        there.close()
        try:
            while len(found) < len(inputs):
                found.append(here.recv())
        except EOFError:
            child.join()
            code = child.exitcode or 0
            is_late = -code in (signal.SIGPROF, signal.SIGALRM)
            found.append(Outcome(kind="hang" if is_late else "died", message=f"exit code {code}"))
        finally:
            here.close()
            child.join()
    return found


def _work(
    read: Callable[[Any], object], inputs: Iterable[Any], there: Any, refusals: tuple[type[Exception], ...]
) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES, hard))
    for one in inputs:
        before = _reset_peak()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        start = time.process_time()
        try:
            read(one)
            kind, message = "read", ""
        except refusals as error:
            kind, message = "refused", str(error)
        except BaseException as error:
            kind, message = "uncaught", "".join(traceback.format_exception(error)[-4:])[-1500:]
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        more = _status("VmHWM") - before
        if more > MEMORY and kind != "uncaught":
            kind = "memory"
        there.send(Outcome(kind=kind, message=message, seconds=time.process_time() - start, num_bytes=more))  # type: ignore[arg-type]
    there.close()
    os._exit(0)


def _reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
