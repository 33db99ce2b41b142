"""Let the disk run full: one line names the file and the disk's error; with more room the same command ends well."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from faults_campaign.cases import Case
from faults_campaign.forked import Ended, Hook
from faults_campaign.kills import ends_right, half_written, last_line, read_only
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row
from faults_campaign.stage import Stage
from faults_campaign.trees import tree_of

CLONE_NEWNS = 0x20000
FULL = "No space left on device"
ROOMY = "1g"
PAGE = os.sysconf("SC_PAGE_SIZE")


def may_mount() -> bool:
    """Give this process mounts of its own, which its children share and nobody else sees; False where it may not."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at `folder`, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, size: int | str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def used(folder: Path) -> int:
    """Bytes that are taken on the file system of a folder."""
    about = os.statvfs(folder)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


class Fills:
    """Runs of a stage on a small disk: its trial folder is one."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._room: dict[str, tuple[int, int]] = {}

    def trial(self, case: Case, number: int, seed: int) -> Row:
        """One trial of a case, with room for its inputs and a share of what a run needs beside them."""
        stage = self._stage
        reference = stage.reference(case)
        low, high = self._bounds(case)
        share = random.Random(f"{seed} fill {case.name} {number}").random()
        size = low + (int(share * (high - low)) // PAGE + 1) * PAGE
        with small_disk(stage.trial):
            stage.fresh(case)
            resize(stage.trial, max(size, used(stage.trial) + PAGE))
            ended = stage.start(case)
            resize(stage.trial, ROOMY)
            found = tree_of(stage.trial)
            wrong = half_written(case, found, reference) or read_only(case, found, reference)
            has_room = ended.status == 0
            if has_room:
                wrong = wrong or ends_right(case, reference, found, ended, found)
            else:
                wrong = wrong_end(ended) or wrong
                wrong = wrong or ends_right(case, reference, found, stage.again(case), tree_of(stage.trial))
        outcome = FELL if wrong else NOT_COUNTED if has_room else PASSED
        where = f"room for {(size - low) / (high - low):.0%} of what the run needs"
        return Row(part="fill", case=case.name, number=number, phase="full", point=where, outcome=outcome, detail=wrong)

    def _bounds(self, case: Case) -> tuple[int, int]:
        """Bytes of the inputs, and of the most that lay there during a run."""
        if case.name not in self._room:
            stage = self._stage
            with small_disk(stage.trial):
                stage.fresh(case)
                low = used(stage.trial)
                most = stage.said / "most"
                ended = stage.start(case, hooks=[watching(stage.trial, most)])
                assert not ended.status, ended.err
                self._room[case.name] = low, max(int(most.read_text()), used(stage.trial), low + 2 * PAGE)
        return self._room[case.name]


def watching(folder: Path, most: Path) -> Hook:
    """A hook that notes in a file the most bytes that were taken at any file event."""

    def hook() -> None:
        seen, is_noting = 0, False

        def on_event(what: str, values: tuple[object, ...]) -> None:
            nonlocal seen, is_noting
            if is_noting or not what.startswith(("open", "os.re", "shutil.")):
                return
            now = used(folder)
            if now > seen:
                is_noting, seen = True, now
                most.write_text(str(now))
                is_noting = False

        sys.addaudithook(on_event)

    return hook


def wrong_end(ended: Ended) -> str:
    """What is wrong with how a command ended on a full disk; "" for nothing."""
    lines = ended.lines
    checks = (
        (ended.hangs, "it hangs"),
        ("Traceback" in ended.err, f"a traceback: {last_line(ended)}"),
        (ended.status != 1, f"status {ended.status}, expected 1; {last_line(ended)}"),
        (len(lines) != 1, f"{len(lines)} lines on standard error, expected one: {last_line(ended)}"),
        (FULL not in ended.err, f"{FULL!r} is missing in: {last_line(ended)}"),
        (not names_a_file(lines[0] if lines else ""), f"no file named in: {last_line(ended)}"),
    )
    return next((words for is_so, words in checks if is_so), "")


def names_a_file(line: str) -> bool:
    """True where a word of the line is a path with a file's ending, or lies in a work folder."""
    return any("." in word.strip("'\",:;()").rpartition("/")[2][:-1] for word in line.split()[1:])
