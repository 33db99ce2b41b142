"""A line when a rank waits long for others: of those, one may have left a call out."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

SECONDS = 10.0


@contextlib.contextmanager
def told_when_long(call: str, rank: int, size: int) -> Iterator[None]:
    """Around a call of all ranks. After `SECONDS` in it, this rank says once what it waits for."""
    if size == 1:
        yield
        return
    line = (
        f"rank {rank} of {size} has waited {SECONDS:.0f} s in {call} for the other ranks: all of them must call it "
        "(one that only takes long, in an evaluation say, is no fault)"
    )
    timer = threading.Timer(SECONDS, logging.getLogger("secateur").warning, args=(line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
