"""What a person sees while a run is going: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers.utils import logging as transformers_logging

from secateur.files.progress import no_loading_bars

LINES_PER_RUN = 12
WIDE = 105


@contextlib.contextmanager
def only_our_messages() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers and torch.distributed off the terminal; errors still come."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch_logger = logging.getLogger("torch.distributed")
    level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        with no_loading_bars(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
            yield
    finally:
        torch_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


class RunProgress:
    """A progress bar with loss, tokens/s, phase and load; `quiet` shows nothing at all."""

    def __init__(self, description: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._total = total
        self._description = description
        self._next_line = done
        core = (MofNCompleteColumn(), TextColumn("{task.fields[numbers]}", markup=False))
        wide = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), *core, TimeElapsedColumn())
        # a narrow terminal would cut off the numbers and the time left
        columns = wide if self._console.width >= WIDE else core
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(description, total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int) -> None:
        """Move the bar without new numbers."""
        self._progress.update(self._task, completed=done)

    def numbers(self, done: int, numbers: str) -> None:
        """New numbers at a log step."""
        self._progress.update(self._task, completed=done, numbers=numbers)
        if not self._live and (done >= self._next_line or done == self._total):
            self._next_line = done + max(1, self._total // LINES_PER_RUN)
            self.say(f"{self._description} {done}/{self._total}  {numbers}")

    def show(self, done: int, total: int, numbers: str) -> None:
        """`numbers`, or without any a step; in the form that a `TrainingLog` calls."""
        self.numbers(done, numbers) if numbers else self.step(done)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), highlight=False, soft_wrap=True)


class StageProgress:
    """For the work before training: called with (description, done, total or None)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, description: str, done: int, total: int | None) -> None:
        if description not in self._tasks:
            self._tasks[description] = self._progress.add_task(description, total=total)
        self._progress.update(self._tasks[description], completed=done, total=total)  # type: ignore[arg-type]
