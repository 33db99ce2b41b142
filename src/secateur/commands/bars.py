"""Bars on standard error, for work that takes long; each goes away when the work is done."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from secateur.files.progress import OnStage

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


TRAININGS = ("pretrain", "control", "finetune")
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
def run_bars(*, quiet: bool) -> Iterator[OnStage | None]:
    """Of a training, see `Steps`, a bar with its numbers, or lines where there is no terminal; of what comes before it,
    one bar a stage.
    """
    from secateur.train.progress import RunProgress, StageProgress

    if quiet:
        yield None
        return
    with contextlib.ExitStack() as now:
        bars: dict[str, RunProgress] = {}
        stages: list[StageProgress] = []

        def on_stage(what: str, done: int, total: int) -> None:
            name, mark, text = re.split(r"(, |: |$)", what, maxsplit=1)
            if name not in TRAININGS:
                if not stages:
                    stages.append(now.enter_context(StageProgress()))
                stages[0](what, done, total or None)
                return
            if name not in bars:
                now.close()
                bars[name] = now.enter_context(RunProgress(name, total, done=done))
            if mark == ": ":
                bars[name].say(text)
            else:
                bars[name].show(done, total, text)

        yield on_stage


def _bar(*columns: ProgressColumn, show: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    described = (TextColumn("{task.description}", markup=False), BarColumn(), *columns)
    return Progress(*described, console=Console(stderr=True), transient=True, disable=not show)
