"""How work that takes long tells how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

OnProgress = Callable[[int, int], None]  # called with (done, in all)
OnStage = Callable[[str, int, int], None]  # called with (what is being done, done, in all; 0 where that is unknown)
OnChunk = Callable[[int], None]  # called with what was done since the last call


def silent(done: int, total: int) -> None:
    """For whoever does not want to know."""


def stage(what: str, on_stage: OnStage | None) -> OnProgress:
    """What one stage of the work calls, so that `on_stage` hears its name too."""
    return silent if on_stage is None else lambda done, total: on_stage(what, done, total)


class Steps:
    """The steps of a training called `name`, told to `on_stage`.

    What it hears is "pretrain", with the newest numbers "pretrain, loss 1.234", and of what happens "pretrain: step 20:
    validation loss 2.345".
    """

    def __init__(self, name: str, on_stage: OnStage | None, *, done: int = 0, total: int = 0) -> None:
        self._name, self._on_stage = name, on_stage
        self._done, self._total = done, total
        if total:
            self.show(done, total, "")

    def show(self, done: int, total: int, numbers: str) -> None:
        """So many steps are done."""
        self._done, self._total = done, total
        self._tell(f", {numbers}" if numbers else "")

    def say(self, text: str) -> None:
        """Something has happened."""
        self._tell(f": {text}")

    def _tell(self, more: str) -> None:
        if self._on_stage is not None:
            self._on_stage(self._name + more, self._done, self._total)


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """While it lasts, transformers shows no bars beside our own."""
    from transformers.utils import logging  # here: what writes files starts without transformers

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def counted(total: int, on_progress: OnProgress) -> OnChunk:
    """What to call with the bytes of every chunk, so that `on_progress` hears (bytes done, `total`)."""
    done = 0

    def on_chunk(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    return on_chunk
