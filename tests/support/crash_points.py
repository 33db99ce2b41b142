"""Every moment at which a process changes the files of a folder: die there, as by `kill -9`, or be interrupted there.

Python tells of an open, a rename or a removal before it happens. Of what was written last, half is cut off before the
process dies, as nobody knows how much of it has reached the disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.faults import die

# event -> which of its arguments are paths
EVENTS = {"open": (0,), "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.truncate": (0,)}
WRITING = os.O_WRONLY | os.O_RDWR


class CrashPoint:
    """From its call on, `happen` at the `nth` change below `root`; without a number, write each to `count`."""

    def __init__(
        self, root: Path, nth: int = 0, *, count: Path | None = None, happen: Callable[[], Any] = die, cut: bool = True
    ) -> None:
        self.root, self.nth, self.count, self.happen, self.cut = str(root), nth, count, happen, cut
        self.seen = 0
        self.last: Path | None = None
        self.before = 0  # bytes in it when it was opened

    def __call__(self) -> None:
        self.owner = os.getpid()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, values: tuple[Any, ...]) -> None:
        if event not in EVENTS or os.getpid() != self.owner:
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITING):
            return
        paths = [os.fspath(values[place]) for place in EVENTS[event] if not isinstance(values[place], int)]
        if not any(str(path).startswith(self.root) for path in paths) or (self.count and paths[0] == str(self.count)):
            return
        self.seen += 1
        if self.count is not None:
            count, self.count = self.count, None
            with count.open("a") as file:
                file.write(f"{event} {' '.join(map(str, paths))}\n")
            self.count = count
        if self.seen == self.nth:
            if self.cut and self.last is not None and self.last.is_file():
                os.truncate(self.last, (self.before + self.last.stat().st_size) // 2)
            self.happen()
        if event == "open":
            self.last = Path(paths[0])
            keeps = self.last.is_file() and not values[2] & os.O_TRUNC
            self.before = self.last.stat().st_size if keeps else 0
        elif event == "os.rename" and str(self.last) == paths[0]:
            self.last = None  # whoever renames it has flushed it, or writes it again


def forked(action: Callable[[], Any], *hooks: Callable[[], None]) -> int:
    """Run what computes nothing in a fork of this process: 0 if it ends, 1 if it raises, -9 for SIGKILL."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for hook in hooks:
                hook()
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes_of(root: Path, action: Callable[[], Any]) -> int:
    """How often `action` changes something below `root`; run in a fork, so what it leaves is there."""
    count = root.parent / f"{root.name}-changes"
    count.unlink(missing_ok=True)
    assert forked(action, CrashPoint(root, count=count)) == 0
    return len(count.read_text().splitlines())
