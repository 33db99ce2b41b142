"""Where the runs of the campaign happen: always in the same folder, made new each time, so that paths are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pkgutil
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import secateur
from faults_campaign.cases import Case
from faults_campaign.events import Event, Point
from faults_campaign.forked import Ended, Hook, run, traced
from faults_campaign.inputs import make_inputs
from faults_campaign.trees import Tree, tree_of

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fedccc59e7"
    "0000000049454e44ae426082"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A case run undisturbed: the folder before and after, and its file events, each with its phase."""

    before: Tree
    after: Tree
    events: tuple[Event, ...]
    phases: tuple[str, ...]
    seconds: float

    def phase_at(self, event: int) -> str:
        """Of the `event`-th event, counted from 1."""
        return self.phases[min(max(event, 1), len(self.phases)) - 1] if self.phases else "write"

    def is_written_after(self, event: int) -> bool:
        """True where a byte has been written when the next event comes."""
        return event >= len(self.events) or self.events[event].is_written

    def gap_after(self, event: int) -> float:
        """Seconds from an event to the next one, or to the end."""
        times = [one.seconds for one in self.events] + [self.seconds]
        return max(0.004, times[min(event, len(times) - 1)] - times[event - 1])


class Stage:
    """Folders for a campaign. hooks: what every child does first."""

    def __init__(self, work: Path, hooks: Sequence[Hook] = ()) -> None:
        self.work, self.trial, self.said = work, work / "trial", work / "said"
        self.inputs, self.hooks = work / "inputs", [few_strokes, steps_of_a_second, *hooks]
        self._references: dict[str, Reference] = {}
        self.said.mkdir(parents=True, exist_ok=True)

    def make(self) -> None:
        """The inputs, by the commands themselves."""
        make_inputs(self.inputs, self._must_run)

    def _must_run(self, words: str, cwd: Path) -> None:
        ended, _ = traced(words.split(), cwd, self.said, self.hooks)
        if ended.status:
            raise RuntimeError(f"{words}: ended with status {ended.status}: {ended.err[-2000:]}")

    def fresh(self, case: Case, trial: Path | None = None) -> Path:
        """The trial folder with the inputs of a case and nothing else."""
        trial = trial or self.trial
        emptied(trial)
        for name in case.inputs.split():
            source = self.inputs / name
            if source.is_dir():
                shutil.copytree(source, trial / name)
            else:
                shutil.copy2(source, trial / name)
        return trial

    def reference(self, case: Case) -> Reference:
        """What an undisturbed run of a case leaves."""
        if case.name not in self._references:
            before = tree_of(self.fresh(case))
            self._must_run(case.words, self.trial)  # the first one also imports; the second is timed
            self.fresh(case)
            ended, events = traced(case.words.split(), self.trial, self.said, self.hooks)
            if ended.status:
                raise RuntimeError(f"{case.name}: ended with status {ended.status}: {ended.err[-2000:]}")
            self._references[case.name] = Reference(
                before=before,
                after=tree_of(self.trial),
                events=tuple(events),
                phases=phases_of(case, events),
                seconds=ended.seconds,
            )
        return self._references[case.name]

    def start(self, case: Case, *, hooks: Sequence[Hook] = (), point: Point | None = None) -> Ended:
        """Run a case in the trial folder as it is."""
        return run(case.words.split(), self.trial, self.said, hooks=[*self.hooks, *hooks], point=point)

    def again(self, case: Case, *, point: Point | None = None) -> Ended:
        """The same command again; where it says that --resume goes on, with that."""
        ended = self.start(case, point=point)
        if ended.status == 2 and case.resume is not None and "--resume" in ended.err:
            ended = self.start(dataclasses.replace(case, words=case.resume), point=point)
        return ended


def emptied(folder: Path) -> None:
    """Make it, or take all out of it: the folder itself may be a file system."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def phases_of(case: Case, events: Sequence[Event]) -> tuple[str, ...]:
    """The phase of each event: the phases come in their order."""
    found, at = [], 0
    for event in events:
        while at + 1 < len(case.phases) and re.search(case.phases[at + 1][1], event.path):
            at += 1
        found.append(case.phases[at][0])
    return tuple(found)


def import_everything() -> None:
    """All modules of secateur, and what transformers makes once a process."""
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
        if module.name != "secateur.__main__":
            importlib.import_module(module.name)
    get_checkpoint_conversion_mapping("qwen3_moe")


def source_digest() -> str:
    """What tells this source from another, in rows of earlier runs."""
    folder = Path(secateur.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def few_strokes() -> None:
    """Figures take ten times as long as a run, and are all drawn before the first of them is written."""
    import secateur.reporting.write as write

    write.png = lambda figure: PNG  # type: ignore[attr-defined]


def steps_of_a_second() -> None:
    """A step takes a second, also where an interruption parts the steps between two logs.

    By the clock of the campaign any two looks at it lie a second apart, so that parts would take longer than the whole.
    """
    from support.faults import replace

    def count(so_far: Callable[..., tuple[int, float]]) -> Callable[..., tuple[int, float]]:
        def counted(clock: Any, step: int) -> tuple[int, float]:
            steps, _ = so_far(clock, step)
            return steps, float(steps)

        return counted

    replace("secateur.train.training_log:StepClock.so_far", count)
