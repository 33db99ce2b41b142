"""Bars on standard error, for work that takes long; each goes away when the work is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from secateur.files.progress import OnProgress

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


@contextlib.contextmanager
def bytes_bar(what: str, *, show: bool) -> Iterator[OnProgress]:
    """While bytes are moved: gives what to call with (bytes done, bytes in all)."""
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), show=show) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def batches_bar(what: str, *, show: bool) -> Iterator[OnProgress]:
    """While batches go through a model: gives what to call with (batches done, in all)."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    with _bar(MofNCompleteColumn(), TimeRemainingColumn(), show=show) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def layers_bar(what: str, *, num_batches: int, show: bool) -> Iterator[OnProgress]:
    """While batches go through the layers of a model: gives what to call with (layers x batches done, in all)."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    with _bar(MofNCompleteColumn(), TimeRemainingColumn(), show=show) as bar:
        task = bar.add_task(what, total=None)

        def step(done: int, total: int) -> None:
            layers = total // num_batches
            layer = min(done // num_batches + 1, layers)
            bar.update(task, completed=done, total=total, description=f"{what}, layer {layer} of {layers}")

        yield step


def _bar(*columns: ProgressColumn, show: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    described = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*described, console=Console(stderr=True), transient=True, disable=not show)
