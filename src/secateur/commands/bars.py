"""Bars on standard error, for work that takes long; each goes away when the work is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from secateur.files.progress import OnProgress, OnStage

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


IN_BYTES = ("writing", "comparing", "reading weights")  # stages whose progress is in bytes


@contextlib.contextmanager
def stage_bars(*, show: bool) -> Iterator[OnStage | None]:
    """One bar a stage: gives what to call with (what is being done, done, in all).

    Of "observing, layer 2 of 3" the stage is what stands before the comma; the rest may change while it lasts.
    """
    if not show:
        yield None
        return
    with contextlib.ExitStack() as now:
        name, before, bar = "", 0, None

        def on_stage(what: str, done: int, total: int) -> None:
            nonlocal name, before, bar
            if bar is None or what.partition(",")[0] != name or done < before:
                now.close()
                name = what.partition(",")[0]
                bar = now.enter_context(_bar(*_columns(name), show=True))
                bar.add_task(what, total=None)
            before = done
            bar.update(bar.task_ids[0], description=what, completed=done, total=total)

        yield on_stage


def _columns(stage: str) -> tuple[ProgressColumn, ...]:
    from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

    if stage in IN_BYTES:
        return DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return MofNCompleteColumn(), TimeRemainingColumn()


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
