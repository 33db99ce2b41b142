"""How one goes on with work that was interrupted, told on the way of the interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def told_how_to_go_on(how: str, is_possible: Callable[[], bool]) -> Iterator[None]:
    """Add `how` to an interruption that passes, if something was left to go on from."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_possible():
            error.add_note(how)
        raise
