"""What a child does before it is the command: it counts its file events, sends word of one of them, stops the clock."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link", "os.symlink")
COUNTER = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A name is about to be changed, `path` in the work folder, `seconds` after the start.

    is_written: a byte has been written until then.
    """

    seconds: float
    what: str
    path: str
    is_written: bool = True


@dataclass(frozen=True, kw_only=True)
class Point:
    """When `do` happens to a child: at the `event`-th of its file events, or `delay` seconds after it.

    do: SIGKILL, SIGINT, SIGTERM; or what this process does meanwhile.
    """

    event: int
    delay: float | None = None
    do: int | Callable[[], object] = signal.SIGKILL


class Moment(float):
    """Between any two of them lies a second."""

    def __sub__(self, other: float) -> float:
        return 1.0


def stop_the_clock() -> None:
    """What runs write down of time and memory is then the same in all."""
    import resource

    time.perf_counter = Moment
    resource.getrusage = lambda who: SimpleNamespace(ru_maxrss=1024)  # type: ignore[assignment,return-value]


def count_events(
    root: Path,
    point: Point | None,
    wire: socket.socket,
    counter: mmap.mmap,
    seen: list[tuple[float, str, str, bool]] | None,
) -> None:
    top = str(root)
    started, before = time.monotonic(), _bytes_in(top)
    count = 0

    def on_event(what: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if what == "open":
            path, _, flags = values
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif what in CHANGES:
            path = values[0]
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or (os.path.isabs(path) and not path.startswith(top)):
            return
        count += 1
        counter[: COUNTER.size] = COUNTER.pack(count)
        if seen is not None:
            target = f" -> {os.path.basename(os.fsdecode(values[1]))}" if what == "os.rename" else ""
            is_written = _bytes_in(top) != before
            seen.append((time.monotonic() - started, what, path.removeprefix(top + "/") + target, is_written))
        if point is not None and count == point.event:
            if point.delay is None and isinstance(point.do, int):
                os.kill(os.getpid(), point.do)
            else:
                wire.send(b"x")
                if point.delay is None:
                    wire.recv(1)  # it has been done

    sys.addaudithook(on_event)


def _bytes_in(folder: str) -> int:
    found = 0
    for entry in os.scandir(folder):
        found += (
            _bytes_in(entry.path) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
        )
    return found
