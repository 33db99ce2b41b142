"""How one goes on with work that was interrupted or refused by the disk, told on the way of the error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def told_how_to_go_on(how: str, is_possible: Callable[[], bool]) -> Iterator[None]:
    """Add `how` to an interruption, or a refusal of the disk, that passes, if something was left to go on from."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        if is_possible():
            error.add_note(how)
        raise
