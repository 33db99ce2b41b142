"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # called with (done, in all)
OnStage = Callable[[str, int, int], None]  # called with (what is being done, done, in all)
OnChunk = Callable[[int], None]  # called with what was done since the last call


def silent(done: int, total: int) -> None:
    """For whoever does not want to know."""


def stage(what: str, on_stage: OnStage | None) -> OnProgress:
    """What one stage of the work calls, so that `on_stage` hears its name too."""
    return silent if on_stage is None else lambda done, total: on_stage(what, done, total)


def counted(total: int, on_progress: OnProgress) -> OnChunk:
    """What to call with the bytes of every chunk, so that `on_progress` hears (bytes done, `total`)."""
    done = 0

    def on_chunk(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    return on_chunk
