"""Run a command of `secateur` in a child that is forked from a process which has imported everything: at once.

The child's file events are counted: what Python does to names in its work folder, seen before it is done. A signal is
sent at one of them, or a time after it, when what is under way may be a write of a library in C++ or Rust.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from faults_campaign.events import COUNTER, Event, Point, count_events, stop_the_clock

PATIENCE = 60.0  # seconds; a run takes about one
Hook = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    status: of its exit, -9 for SIGKILL. is_reached: what was to happen has happened. events: that it came to.
    seconds: of the clock. processor: seconds of processor time. memory: bytes above what the parent had.
    """

    status: int
    is_reached: bool
    events: int
    out: str
    err: str
    seconds: float
    processor: float
    memory: int
    hangs: bool = False

    @property
    def lines(self) -> list[str]:
        """What it said on standard error, without the bars of transformers."""
        return [line for line in self.err.splitlines() if line.strip() and "%|" not in line]


class Child:
    """A running command. words: of the command line. cwd: its work folder. said: a folder for what it prints."""

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        said: Path,
        *,
        point: Point | None = None,
        hooks: Sequence[Hook] = (),
        trace: Path | None = None,
    ) -> None:
        self._point, self._reached, self._said = point, False, said
        self._counter = mmap.mmap(-1, mmap.PAGESIZE)
        self._wire, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self._before = _resident()
        self.started = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            self._wire.close()
            _be_the_command(words, cwd, said, point, hooks, trace, theirs, self._counter)
        theirs.close()

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for the end, and do what is to be done meanwhile."""
        try:
            hangs = not self._wait(self.started + patience)
        except BaseException:
            self._kill()
            os.waitpid(self.pid, 0)
            raise
        if hangs:
            self._kill()
        _, status, usage = os.wait4(self.pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has started
        self._wire.close()
        (events,) = COUNTER.unpack(self._counter[: COUNTER.size])
        return Ended(
            status=os.waitstatus_to_exitcode(status),
            is_reached=self._reached or (self._point is not None and events >= self._point.event),
            events=events,
            out=(self._said / "out").read_text(errors="backslashreplace"),
            err=(self._said / "err").read_text(errors="backslashreplace"),
            seconds=time.monotonic() - self.started,
            processor=usage.ru_utime + usage.ru_stime,
            memory=usage.ru_maxrss * 1024 - self._before,
            hangs=hangs,
        )

    def _wait(self, deadline: float) -> bool:
        """False where it takes too long. The wire tells of the point, and is closed when the child ends."""
        while True:
            if not select.select([self._wire], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            if not self._hears():
                return True
            assert self._point is not None
            if self._point.delay and select.select([self._wire], [], [], self._point.delay)[0]:
                return True
            self._reached = True
            if callable(self._point.do):
                self._point.do()
                with contextlib.suppress(OSError):
                    self._wire.send(b"x")
            else:
                os.kill(self.pid, self._point.do)

    def _hears(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return bool(self._wire.recv(1))
        return False

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run(words: Sequence[str], cwd: Path, said: Path, **more: Any) -> Ended:
    """Run a command to its end, see `Child`."""
    patience = more.pop("patience", PATIENCE)
    return Child(words, cwd, said, **more).end(patience)


def traced(words: Sequence[str], cwd: Path, said: Path, hooks: Sequence[Hook] = ()) -> tuple[Ended, list[Event]]:
    """Run a command undisturbed; its end, and its file events."""
    trace = said / "trace"
    ended = run(words, cwd, said, hooks=hooks, trace=trace)
    seen = json.loads(trace.read_text())
    for name in seen["modules"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)  # so that the next ones need not
    gc.freeze()
    return ended, [Event(seconds=one[0], what=one[1], path=one[2], is_written=one[3]) for one in seen["events"]]


def call(function: Callable[..., object], *values: Any) -> None:
    """Call a function in a child, so that nothing is left of it here: no thread, no memory.

    Raises:
        RuntimeError: it failed; the child has told why.
    """
    pid = os.fork()
    if not pid:
        with _the_end():
            function(*values)
    if status := os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{function.__name__} ended with status {os.waitstatus_to_exitcode(status)}")


def _be_the_command(
    words: Sequence[str],
    cwd: Path,
    said: Path,
    point: Point | None,
    hooks: Sequence[Hook],
    trace: Path | None,
    wire: socket.socket,
    counter: mmap.mmap,
) -> NoReturn:
    with _the_end():
        os.setpgid(0, 0)
        os.chdir(cwd)
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - to the end
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop_the_clock()
        loaded = set(sys.modules)
        seen: list[tuple[float, str, str, bool]] = []
        for hook in hooks:
            hook()
        count_events(cwd, point, wire, counter, seen if trace else None)
        sys.argv = ["secateur", *words]
        from secateur.__main__ import main

        try:
            main()
        finally:
            if trace:
                trace.write_text(json.dumps({"events": seen, "modules": sorted(set(sys.modules) - loaded)}))


def _resident() -> int:
    """Bytes of memory that this process has, which its child begins with."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@contextlib.contextmanager
def _the_end() -> Iterator[None]:
    """End as a process of its own would: with the status of SystemExit, or with a traceback and 1."""
    status = 0
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
