"""The folder beside a result in which a long run keeps what is done, so that it can be killed and go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.digest import sha256_of
from secateur.files.opened import opened
from secateur.files.work_folder import Work, as_noted, differing, work_folder
from secateur.stats import LayerStats, RouterStats

RUN = "run.json"
WRITTEN = "written"  # in it, the SHA-256 of the result once that is there
LISTED = 3  # differences in a message


class WorkFolder:
    """`.NAME.work` beside the file NAME: what the run is of, statistics of the layers that are done, hidden states."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.path = out.parent / f".{out.name}.work"
        self.states = self.path / "states"
        self._layers = self.path / "layers"

    @property
    def is_begun(self) -> bool:
        return (self.path / RUN).exists()

    @contextlib.contextmanager
    def opened(self, run: Mapping[str, Any]) -> Iterator[Callable[[], None] | None]:
        """Keep other processes out while it lasts, and keep what it has of a run that was interrupted.

        Gives what is called when the result is written, or None where it was written already by a process that was
        killed afterwards. When the block ends well, the folder goes away.

        Args:
            run: what decides the result, as flat JSON; the run that was interrupted must have had the same.

        Raises:
            SecateurError: another process is at work here, or an interrupted run was of something else.
            OSError: the folder cannot be written.
        """
        with self._work() as work:
            before = dict(work.before or {})
            written = before.pop(WRITTEN, None)
            if work.before is not None:
                self._check(before, as_noted(run))
            if written is not None and self._out.is_file() and sha256_of(self._out) == written:
                yield None
            else:
                if work.before is None or written is not None:  # a result that is gone again took the layers with it
                    work.clear()
                    self._layers.mkdir()
                    work.note(run)
                yield lambda: work.note({**run, WRITTEN: sha256_of(self._out)})
            work.remove()

    def discard(self) -> None:
        """Throw away what an interrupted run left.

        Raises:
            SecateurError: another process is at work here.
        """
        if self.path.exists():
            with self._work(restart=True):
                pass

    def remove_empty(self) -> None:
        """Take the folder away where a process was killed when all else of it had gone.

        Raises:
            SecateurError: another process is at work here.
        """
        if self.path.is_dir() and not self.is_begun:
            with self._work():
                pass

    def save_layer(self, layer: int, stats: LayerStats) -> None:
        """Keep the statistics of a layer; they count once their digest is there."""
        path = self._layers / f"{layer}.safetensors"
        RouterStats(layers={layer: stats}).save(path)
        atomic_write(path.with_suffix(".sha256"), sha256_of(path))

    def load_layer(self, layer: int) -> LayerStats:
        """What `save_layer` kept.

        Raises:
            SecateurError: it is not there, or damaged.
        """
        path = self._layers / f"{layer}.safetensors"
        try:
            with opened(path.with_suffix(".sha256")) as file:
                digest = file.read(100).decode(errors="replace")
            stats = RouterStats.load(path).layers[layer]
            if sha256_of(path) != digest:
                raise SecateurError("its digest is another one")
            return stats
        except (SecateurError, KeyError) as error:
            raise SecateurError(f"{path}: not what an unfinished run writes ({error}); use --restart") from error

    def _work(self, *, restart: bool = False) -> contextlib.AbstractContextManager[Work[dict[str, Any]]]:
        refusal = f"{self.path}: another process is at work for the same result"
        return work_folder(self.path, dict[str, Any], refusal, restart=restart, note=RUN)

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if names := differing(before, now):
            pairs = [f"{name} was {before.get(name)!r:.80}, is {now.get(name)!r:.80}" for name in names[:LISTED]]
            raise SecateurError(
                f"{self.path}: holds an unfinished run of something else ({'; '.join(pairs)}); finish that one with "
                "its own arguments, or throw it away with --restart"
            )
