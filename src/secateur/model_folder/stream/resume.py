"""The folder beside a result in which a long run keeps what is done, so that it can be killed and go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.stats import LayerStats, RouterStats

LISTED = 3  # differences in a message


class WorkFolder:
    """`.NAME.work` beside the file NAME: what the run is of, statistics of the layers that are done, hidden states."""

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f".{out.name}.work"
        self.states = self.path / "states"
        self._lock, self._run, self._layers = self.path / "lock", self.path / "run.json", self.path / "layers"

    @property
    def is_begun(self) -> bool:
        return self._run.exists()

    @contextlib.contextmanager
    def opened(self, run: Mapping[str, Any]) -> Iterator[None]:
        """Keep other processes out while it lasts, and keep what it has of a run that was interrupted.

        Args:
            run: what decides the result, as flat JSON; the run that was interrupted must have had the same.

        Raises:
            SecateurError: another process is at work here, or an interrupted run was of something else.
            OSError: the folder cannot be written.
        """
        with self._locked():
            if self.is_begun:
                self._check(run)
            else:
                for folder in (self.states, self._layers):
                    shutil.rmtree(folder, ignore_errors=True)
                self._layers.mkdir()
                atomic_write(self._run, json.dumps(dict(run), indent=1))
            yield

    def discard(self) -> None:
        """Throw away what an interrupted run left.

        Raises:
            SecateurError: another process is at work here.
        """
        if self.path.exists():
            with self._locked():
                self._run.unlink(missing_ok=True)
                shutil.rmtree(self.path)

    def save_layer(self, layer: int, stats: LayerStats) -> None:
        """Keep the statistics of a layer."""
        atomic_write(self._layers / f"{layer}.json", json.dumps(RouterStats(layers={layer: stats}).to_json()))

    def load_layer(self, layer: int) -> LayerStats:
        """What `save_layer` kept.

        Raises:
            SecateurError: it is not there, or damaged.
        """
        path = self._layers / f"{layer}.json"
        try:
            return RouterStats.from_json(json.loads(path.read_text(encoding="utf-8"))).layers[layer]
        except (OSError, ValueError, KeyError) as error:
            raise SecateurError(f"{path}: not what an unfinished run writes ({error}); use --restart") from error

    def remove(self) -> None:
        """The result is written; the folder goes away."""
        self._run.unlink()  # first, so that what a kill leaves counts for nothing
        shutil.rmtree(self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The system lets go of the lock when the process ends, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), self._lock.stat()):  # its owner has just left
                    raise BlockingIOError
            except BlockingIOError as error:
                raise SecateurError(f"{self.path}: another process is at work for the same result") from error
            yield

    def _check(self, run: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._run.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SecateurError(f"{self._run}: not what an unfinished run writes ({error}); use --restart") from error
        now = json.loads(json.dumps(dict(run)))
        differ = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if differ:
            pairs = [f"{name} was {before.get(name)!r:.80}, is {now.get(name)!r:.80}" for name in differ[:LISTED]]
            raise SecateurError(
                f"{self.path}: holds an unfinished run of something else ({'; '.join(pairs)}); finish that one with "
                "its own arguments, or throw it away with --restart"
            )
