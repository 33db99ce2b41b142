"""The folder of a run: which files it has, and how they are put back to the state of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write, fsync_file
from secateur.files.json import read_lines, read_object
from secateur.files.lock import locked
from secateur.files.records import Count, Finite, as_record
from secateur.files.refused import naming
from secateur.files.work_folder import differing
from secateur.plans import Plan
from secateur.pretraining.options import PretrainOptions
from secateur.reporting.run_files import UNPRUNED, EvalPoint, RunFile
from secateur.surgery.events import PruneEvent, read_events
from secateur.train.checkpoints import step_of

DIGESTS = "run-digests.json"  # in a checkpoint


class RunFolder:
    """Paths and writers of one run folder; the control run is a folder of the same form inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self.run = path / "run.json"
        self.data = path / "data"
        self.metrics = path / "metrics.jsonl"
        self.loads = path / "loads.jsonl"
        self.events = path / "events.json"
        self.summary = path / "summary.json"
        self.unpruned = path / UNPRUNED
        self.plan = path / "plan.json"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    @property
    def control(self) -> RunFolder:
        return RunFolder(self.path / "control")

    def require_new(self) -> None:
        """Raise when the folder has anything in it but a lock.

        Raises:
            SecateurError: it is a file, or not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SecateurError(f"--out {self.path}: expected a folder, found a file")
        if self.path.is_dir() and any(entry != self.lock for entry in self.path.iterdir()):
            hint = "; go on with it by --resume" if self.run.exists() else ""
            if not hint and (self.metrics.exists() or self.checkpoints.exists()):
                hint = "; they are of a run whose run.json is gone, so nobody can go on with it: take the folder away"
            raise SecateurError(f"--out {self.path}: expected a new or empty folder, found files in it{hint}")

    def require_there(self) -> None:
        """Raises SecateurError: the folder was taken away, or emptied, while its run is going."""
        if not self.run.exists():
            raise SecateurError(
                f"{self.run}: it is gone; the folder of the run was removed while the run was going. Take away what is "
                "left of it, and start again"
            )

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder; if what follows fails and leaves it empty, take it away again.

        Raises:
            SecateurError: it cannot be made.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"--out {self.path}: cannot be made ({error.strerror})") from error
        try:
            yield
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    self.path.rmdir()
            raise

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; see `files.lock`.

        Raises:
            SecateurError: another process has it, or the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.lock, f"{self.path}: another process is running in this folder"))
            except OSError as error:
                raise SecateurError(f"--out {self.path}: cannot be written ({error.strerror})") from error
            yield

    def read_run(self) -> dict[str, Any]:
        """run.json of a run that was started before; what its entries hold is checked.

        Raises:
            SecateurError: there is none, it cannot be read, or something is wrong in it.
        """
        if not self.run.is_file():
            found = "found no run.json in it" if self.path.is_dir() else "there is no such folder"
            raise SecateurError(f"{self.path}: nothing to resume, {found}")
        content = read_object(self.run)
        as_record(content, RunFile, str(self.run))
        return content

    def read_options(self) -> PretrainOptions:
        """The settings of a run that was started before. Raises as `read_run`."""
        saved = self.read_run()["config"]
        try:
            return PretrainOptions.from_json(saved)
        except SecateurError as error:
            raise SecateurError(f"{self.run}: {error}") from error

    def write_events(self, events: Iterable[PruneEvent]) -> None:
        write_json(self.events, [_in_order(event.to_json()) for event in events])

    def whole_plan(self) -> Plan:
        """All prunings so far as one plan, from the experts the run began with."""
        model = as_record(self.read_run(), RunFile, str(self.run)).model
        if model is None:
            raise SecateurError(f"{self.run}: 'model' is missing, expected the model of the run")
        plans = (event.plan for event, _ in read_events(self.events))
        return functools.reduce(Plan.compose, plans, Plan.identity(model.experts))

    def flush_logs(self) -> None:
        """Put the lines of the logs on the disk."""
        for path in (self.metrics, self.loads):
            if path.exists():
                fsync_file(path)

    def eval_at(self, step: int) -> dict[str, Any] | None:
        """The validation after `step`: "validation_loss" and "validation_loss_by_domain"; None if there was none."""
        points = [
            as_record(line, EvalPoint, str(self.metrics))
            for logged, line in _whole_lines(self.metrics)
            if (logged.kind, logged.step) == ("eval", step)
        ]
        if not points:
            return None
        return {"validation_loss": points[-1].validation_loss, "validation_loss_by_domain": points[-1].by_domain}

    def rewind(self, step: int) -> float:
        """Drop all lines after `step` from the logs; returns the training seconds of the last line that stays."""
        seconds = 0.0
        for path in (self.metrics, self.loads):
            kept, text = _until(path, step)
            atomic_write(path, text)
            seconds = max([seconds, *(logged.seconds for logged in kept)])
        return seconds

    def note_digests(self, checkpoint: Path) -> None:
        """Keep in a new checkpoint what run.json and the logs hold now, by which a resume knows them again."""
        write_json(checkpoint / DIGESTS, self._digests(step_of(checkpoint)))

    def check_digests(self, checkpoint: Path) -> None:
        """See that run.json, and the logs up to its step, are what they were when a checkpoint was written.

        Raises:
            SecateurError: one of them was changed, or is gone.
        """
        noted = checkpoint / DIGESTS
        if not noted.exists():  # of an earlier release
            return
        before = as_record(read_object(noted), dict[str, str], str(noted))
        now = self._digests(step_of(checkpoint))
        if names := differing(before, now):
            raise SecateurError(
                f"{self.path / names[0]}: it was changed, or taken away, since {checkpoint} was written; put it back, "
                "or start a new run"
            )

    def _digests(self, step: int) -> dict[str, str]:
        texts = {path.name: _until(path, step)[1].encode() for path in (self.metrics, self.loads)}
        if self.run.is_file():
            texts[self.run.name] = self.run.read_bytes()
        return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """What every line of a log says: of which kind it is, in metrics.jsonl, and when it was written."""

    step: Count
    kind: Literal["train", "eval"] | None = None
    seconds: Finite = 0.0


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line and hand it to the system.

    Raises:
        OSError: the disk refused; the message names the file.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def _in_order(value: Any, *, by_name: bool = False) -> Any:
    """JSON in one order, also of what comes from a checkpoint, whose keys transformers sorts as texts.

    Layers stand by number, and what a plan says of how it was decided by name.
    """
    if isinstance(value, list):
        return [_in_order(one, by_name=by_name) for one in value]
    if not isinstance(value, dict):
        return value
    inside = {name: _in_order(one, by_name=by_name or name == "details") for name, one in value.items()}
    if inside and all(name.isdecimal() for name in inside):
        return {name: inside[name] for name in sorted(inside, key=int)}
    return {name: inside[name] for name in sorted(inside)} if by_name else inside


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, written whole or not at all."""
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _until(path: Path, step: int) -> tuple[list[Logged], str]:
    """The lines of a log up to a step, read and as text."""
    kept = [(logged, line) for logged, line in _whole_lines(path) if logged.step <= step]
    return [logged for logged, _ in kept], "".join(json.dumps(line) + "\n" for _, line in kept)


def _whole_lines(path: Path) -> list[tuple[Logged, Any]]:
    """The lines up to one that a kill has cut short: what follows that is after the checkpoint."""
    lines = read_lines(path, until_cut=True) if path.exists() else ()
    return [(as_record(line, Logged, where), line) for where, line in lines]
