"""How a command ends that is interrupted: by Ctrl-C, or by the SIGTERM that schedulers send before they kill."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from secateur.errors import causes_of

_came: list[Interrupted] = []  # what was raised since the command began
AGAIN = "run the same command again"
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted by SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """A signal; what is being done cleans up after itself, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def interruptible(*, to_the_end: bool = False) -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM raise `Interrupted`; one that was ignored, as by nohup, stays ignored.

    Args:
        to_the_end: of the process; afterwards they are ignored, as all is done. Otherwise they are as they were before.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        _came.clear()
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end else handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _came.append(Interrupted(number))
    raise _came[-1]


def interruption_in(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that led to an error; typer makes an exit of it, and cleaning up may fail with another error.

    Code in C++ may lose it, as where it only asks whether an object has an attribute, and fail at what comes of that:
    after a signal every error counts as its doing.
    """
    if isinstance(error, SystemExit) and error.code != 128 + signal.SIGINT:
        return None
    found = (cause for cause in causes_of(error, suppressed=True) if isinstance(cause, KeyboardInterrupt))
    return next(found, _came[-1] if _came else None)


def leave_interrupted(error: KeyboardInterrupt) -> NoReturn:
    """Say in one line what happened and how to go on, which is what the error was told on its way (`add_note`)."""
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # the line is about to come, and then the end
    if os.environ.get("RANK", "0") != "0":
        sys.exit(128 + number)  # one line a job
    from secateur.commands.exits import fail

    fail("; ".join([SIGNALS[signal.Signals(number)], *getattr(error, "__notes__", (AGAIN,))]), 128 + number)
