"""A bar on standard error while batches go through the layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def layers_bar(what: str, *, num_batches: int, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives what to call with (layers x batches done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=None)

        def step(done: int, total: int) -> None:
            layers = total // num_batches
            layer = min(done // num_batches + 1, layers)
            bar.update(task, completed=done, total=total, description=f"{what}, layer {layer} of {layers}")

        yield step
