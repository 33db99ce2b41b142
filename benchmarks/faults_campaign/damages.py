"""Damage a file that a command reads: it is refused in one line that names it, or read where nothing is wrong."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from faults_campaign.cases import Case
from faults_campaign.events import Point
from faults_campaign.forked import Ended, run, traced
from faults_campaign.readers import STOPPED, Reader
from faults_campaign.rows import FELL, PASSED, Row
from faults_campaign.stage import Stage
from faults_campaign.trees import Tree, difference, tree_of, under, without
from support.damage import Damaged, damaged_bytes, damaged_file

SECONDS = 5.0  # of processor time
MEMORY = 300 * 2**20  # bytes above the start
ADDRESSES = 3 * 2**30  # bytes of address space; what asks for more gets a MemoryError
PATIENCE = 120.0  # seconds of the clock: on a busy machine a trial gets a tenth of a core
WHOLE_EVERY = 20  # one in so many is not damaged
EVERY = 300  # damaged ones for each command that reads, without those
OF_A_FILE = 400  # that are thought of


class Damages:
    """The readers on a stage, with what each says and leaves of the undamaged file."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._whole: dict[str, tuple[Path, Ended, Tree]] = {}
        self._damaged: dict[str, list[Damaged]] = {}

    def number_of(self, reader: Reader) -> int:
        """Trials that there are of it, undamaged ones too."""
        return len(self._list(reader)) * WHOLE_EVERY // (WHOLE_EVERY - 1) + 1

    def trial(self, reader: Reader, number: int) -> Row:
        """One trial: of a whole file if `number` is a multiple of WHOLE_EVERY."""
        folder, expected, tree = self._reference(reader)
        self._copy(folder)
        damaged = None
        if number % WHOLE_EVERY:
            damaged = self._list(reader)[number - number // WHOLE_EVERY - 1]
            path = self._stage.trial / reader.file
            path.unlink()
            path.write_bytes(damaged.data)
        ended = self._run(reader)
        found = tree_of(self._stage.trial)
        outcome, detail = judged(reader, ended, found, expected, tree, damaged)
        return Row(
            part="damage", case=reader.name, number=number, phase=outcome, outcome=FELL if outcome in FALLS else PASSED,
            detail=detail, point=damaged.name[:120] if damaged else "undamaged", seconds=round(ended.processor, 2),
        )  # fmt: skip

    def _run(self, reader: Reader) -> Ended:
        stage = self._stage
        return run(reader.words.split(), stage.trial, stage.said, hooks=[*stage.hooks, bounded], patience=PATIENCE)

    def _copy(self, folder: Path) -> None:
        shutil.rmtree(self._stage.trial, ignore_errors=True)
        shutil.copytree(folder, self._stage.trial, symlinks=True)

    def _reference(self, reader: Reader) -> tuple[Path, Ended, Tree]:
        if reader.name not in self._whole:
            folder = self._folder(reader)
            if not (folder / reader.file).is_file():
                raise RuntimeError(f"{reader.name}: there is no such file to damage")
            for _ in range(2):  # the first one imports
                self._copy(folder)
                ended, _ = traced(reader.words.split(), self._stage.trial, self._stage.said, self._stage.hooks)
            if ended.status:
                raise RuntimeError(f"{reader.name}: ended with status {ended.status}: {ended.err[-2000:]}")
            self._whole[reader.name] = folder, ended, tree_of(self._stage.trial)
        return self._whole[reader.name]

    def _folder(self, reader: Reader) -> Path:
        """What the trials of a reader begin with: its inputs, or where a command was killed."""
        what = Case(name=reader.name, words=reader.words, inputs=reader.inputs, results=())
        folder = self._stage.work / "folders" / hashlib.sha256((reader.stopped or reader.inputs).encode()).hexdigest()
        if folder.is_dir():
            return folder
        if reader.stopped:
            stopped = STOPPED[reader.stopped]
            what = Case(name=reader.name, words=stopped.words, inputs=stopped.inputs, results=())
            self._stage.fresh(what)
            _, events = traced(what.words.split(), self._stage.trial, self._stage.said, self._stage.hooks)
            at = next(n for n, event in enumerate(events, start=1) if re.search(stopped.pattern, event.path))
            self._stage.fresh(what)
            ended = self._stage.start(what, point=Point(event=at))
            assert ended.status == -signal.SIGKILL, ended
            shutil.copytree(self._stage.trial, folder, symlinks=True)
        else:
            self._stage.fresh(what, folder)
        return folder

    def _list(self, reader: Reader) -> list[Damaged]:
        """So many different damages of its file, in an order that does not change."""
        if reader.name not in self._damaged:
            path = self._folder(reader) / reader.file
            self._damaged[reader.name] = chosen(path.name, path.read_bytes(), OF_A_FILE)
        return self._damaged[reader.name]


def chosen(name: str, data: bytes, number: int) -> list[Damaged]:
    """So many different damages of a file, two thirds of them structured, the rest of its bytes; the same each time."""
    draw = random.Random(f"{name} {len(data)}")
    structured = _sample(damaged_file(name, data), number * 2 // 3, draw)
    others = itertools.chain.from_iterable(damaged_bytes(data, seed=seed, count=60) for seed in range(1, 50))
    found = {data: None, **{one.data: one for one in structured}}
    for one in others:
        if len(found) > number:
            break
        found.setdefault(one.data, one)
    every = [one for one in found.values() if one is not None]
    draw.shuffle(every)
    return every


def _sample(damages: Iterator[Damaged], most: int, draw: random.Random) -> list[Damaged]:
    """Each with the same chance, and no more than these in memory: those of a large file would fill it."""
    found: list[Damaged] = []
    for place, one in enumerate(damages):
        if place < most:
            found.append(one)
        elif (at := draw.randrange(place + 1)) < most:
            found[at] = one
    return found


FALLS = {"uncaught", "hang", "memory", "died", "wrong status", "no file named", "several lines", "left a result",
         "undamaged, not read", "another result", "inputs changed"}  # fmt: skip


def judged(
    reader: Reader, ended: Ended, found: Tree, expected: Ended, tree: Tree, damaged: Damaged | None
) -> tuple[str, str]:
    """(what became of it, the last line)."""
    lines = ended.lines
    last = (lines[-1] if lines else ended.out.strip()[-200:])[:300]
    if damaged is None:
        is_same = ended.status == 0 and ended.out == expected.out and found == tree
        return ("undamaged, read" if is_same else "undamaged, not read"), last or difference(found, tree)
    if ended.hangs or ended.processor > SECONDS or ended.status == -signal.SIGPROF:
        return "hang", f"{ended.processor:.1f} s of processor time, {ended.seconds:.1f} of the clock; {last}"
    if ended.memory > MEMORY:
        return "memory", f"{ended.memory / 2**20:.0f} MiB; {last}"
    if ended.status < 0:
        return "died", f"signal {-ended.status}; {last}"
    if "Traceback" in ended.err:
        return "uncaught", " | ".join(lines[-3:])[:400]
    if ended.status == 0:
        rest, same = without(found, [reader.file]), without(tree, [reader.file])
        if rest == same and ended.out == expected.out:
            return "read, same result", ""
        return ("read, as other content" if reader.is_content else "another result"), difference(rest, same)
    if reader.words.startswith("verify") and ended.status == 1 and '"passed": false' in ended.out:
        return "a check failed", ""
    if ended.status != 2:
        return "wrong status", f"{ended.status}; {last}"
    if len(lines) != 1:
        return "several lines", " | ".join(lines)[:400]
    if not any(name in ended.err for name in [*names_of(reader), *_folder_of_weights(reader, ended)]):
        return "no file named", last
    if left := under(found, reader.results):
        return "left a result", f"{', '.join(left)[:100]}; {last}"
    return "refused", last


def names_of(reader: Reader) -> list[str]:
    """What a message may call the file: its name, or that of the hidden folder in which unfinished work lies."""
    *folders, name = reader.file.split("/")
    return [name, *(folder for folder in folders if folder.startswith("."))]


def _folder_of_weights(reader: Reader, ended: Ended) -> list[str]:
    """The model's folder, where a file of weights was read and what they compute is no number: no file is at fault."""
    folder, _, name = reader.file.rpartition("/")
    return [f"error: {folder}"] if name.endswith(".safetensors") and "not finite" in ended.err else []


def bounded() -> None:
    """Limits of a child: what goes beyond ends it."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS + 1)
