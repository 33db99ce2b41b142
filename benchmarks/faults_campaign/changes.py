"""Change files underneath a command while it runs: an error and no result, or the right one; never a wrong one."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults_campaign.cases import Case
from faults_campaign.events import Point
from faults_campaign.kills import in_words, last_line
from faults_campaign.rows import FELL, NOT_COUNTED, PASSED, Row
from faults_campaign.stage import Reference, Stage
from faults_campaign.trees import Tree, difference, is_under, tree_of, under, without


def _inputs(root: Path, case: Case, endings: tuple[str, ...]) -> list[Path]:
    every = [
        path
        for name in case.inputs.split()
        for path in ([root / name] if (root / name).is_file() else sorted((root / name).rglob("*")))
    ]
    return [path for path in every if path.is_file() and path.name.endswith(endings)]


WEIGHTS = (".safetensors", ".distcp", ".npz", ".jsonl", ".pt", ".txt", ".py", "-00002")


def replaced(root: Path, case: Case, draw: random.Random) -> str:
    """Another file of the same size takes the place of one that the command reads."""
    path = draw.choice(_inputs(root, case, WEIGHTS) or _inputs(root, case, ("",)))
    new = path.with_name(f"{path.name}.new")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(byte ^ 1 for byte in data[len(data) // 2 :])
    new.write_bytes(data)
    os.replace(new, path)
    return str(path.relative_to(root))


def written_over(root: Path, case: Case, draw: random.Random) -> str:
    """A byte in the middle of a file changes, in place, and its time of change is set back."""
    path = draw.choice(_inputs(root, case, WEIGHTS) or _inputs(root, case, ("",)))
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size * 2 // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return str(path.relative_to(root))


def truncated(root: Path, case: Case, draw: random.Random) -> str:
    """A file that the command reads loses its second half."""
    path = draw.choice(_inputs(root, case, WEIGHTS) or _inputs(root, case, ("",)))
    os.truncate(path, path.stat().st_size // 2)
    return str(path.relative_to(root))


def config_cut(root: Path, case: Case, draw: random.Random) -> str:
    """config.json, or another JSON file, loses its second half."""
    path = draw.choice(_inputs(root, case, ("config.json",)) or _inputs(root, case, (".json", ".jsonl", "")))
    os.truncate(path, path.stat().st_size // 2)
    return str(path.relative_to(root))


def removed(root: Path, case: Case, draw: random.Random) -> str:
    """A file that the command reads goes."""
    path = draw.choice(_inputs(root, case, ("",)))
    path.unlink()
    return str(path.relative_to(root))


def own_folder_gone(root: Path, case: Case, draw: random.Random) -> str:
    """What the command has written so far goes, or one folder of it."""
    known = {*case.inputs.split(), *case.results}  # a finished result is its owner's
    folders = [path for path in sorted(root.rglob("*")) if path.is_dir()]
    every = [path for path in folders if not is_under(path.relative_to(root).as_posix(), known)]
    if not every:
        return ""
    path = draw.choice([one for one in every if one.parent == root] * 3 + every)
    shutil.rmtree(path, ignore_errors=True)
    return str(path.relative_to(root))


def out_filled(root: Path, case: Case, draw: random.Random) -> str:
    """Somebody else writes a file where the result is to go."""
    name = case.results[0].partition("/")[0]
    if "." in name or (root / name).exists():
        return ""
    (root / name).mkdir()
    (root / name / "theirs.txt").write_text("not yours\n")
    return f"{name}/theirs.txt"


KINDS: tuple[Callable[[Path, Case, random.Random], str], ...] = (
    replaced, written_over, truncated, config_cut, removed, own_folder_gone, out_filled,
)  # fmt: skip


def change(stage: Stage, case: Case, number: int, seed: int) -> Row:
    """One trial of a case: the change is made at a file event, which waits for it."""
    reference = stage.reference(case)
    draw = random.Random(f"{seed} change {case.name} {number}")
    make = KINDS[number % len(KINDS)]
    done: list[str] = []

    def do() -> None:
        if not done:
            done.append(make(stage.trial, case, draw))

    point = Point(event=draw.randint(1, len(reference.events)), do=do)
    stage.fresh(case)
    ended = stage.start(case, point=point)
    found = tree_of(stage.trial)
    row = {"part": "change", "case": case.name, "number": number, "phase": make.__name__.replace("_", " ")}
    where = f"{done[0] if done else 'nothing'}, {in_words(point, reference)}"
    if not done or not done[0]:
        return Row(**row, point=where, outcome=NOT_COUNTED, detail="nothing to change")
    wrong = ""
    if ended.hangs or "Traceback" in ended.err or ended.status not in (0, 1, 2):
        wrong = f"status {ended.status}: {last_line(ended)}"
    elif ended.status == 0:
        wrong = _other_result(stage, case, found, reference, done[0])
    elif left := _results(case, found, reference, done[0]):
        wrong = f"status {ended.status} ({last_line(ended)}), but there is {', '.join(sorted(left)[:4])}"
    elif len(ended.lines) != 1:
        wrong = f"{len(ended.lines)} lines: {last_line(ended)}"
    if not wrong and ended.status:
        wrong = _next_start(stage, case, reference, done[0])
    return Row(**row, point=where, outcome=FELL if wrong else PASSED, detail=wrong, more={"status": ended.status})


def _results(case: Case, found: Tree, reference: Reference, changed: str) -> list[str]:
    """Names of results that a run which failed has left, where they are not right."""
    mine = under(found, case.results)
    mine = {path: one for path, one in mine.items() if path != changed and not changed.startswith(f"{path}/")}
    if case.replaces or all(reference.after.get(path) == one for path, one in mine.items()):
        return []
    return list(mine)


def _other_result(stage: Stage, case: Case, found: Tree, reference: Reference, changed: str) -> str:
    """Where a run ended well: its result is that of the inputs as they were, or that of the inputs as they are now."""
    names = case.inputs.split() if not case.replaces else [changed]
    mine = without(found, names)
    if mine == without(reference.after, names):
        return ""
    for path in list(stage.trial.iterdir()):
        if path.name not in case.inputs.split():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = stage.start(case)
    now = without(tree_of(stage.trial), names)
    if again.status == 0 and now == mine:
        return ""
    return f"status 0, but {difference(mine, without(reference.after, names))}"


def _next_start(stage: Stage, case: Case, reference: Reference, changed: str) -> str:
    """With the inputs as they were, the next start ends well, or says in one line what is to be done."""
    if changed.endswith("theirs.txt"):
        shutil.rmtree((stage.trial / changed).parent)
    for name in case.inputs.split():
        if name in case.replaces:
            continue
        shutil.rmtree(stage.trial / name) if (stage.trial / name).is_dir() else (stage.trial / name).unlink(
            missing_ok=True
        )
        source = stage.inputs / name
        shutil.copytree(source, stage.trial / name) if source.is_dir() else shutil.copy2(source, stage.trial / name)
    if case.replaces:
        return ""
    again = stage.again(case)
    if again.status == 0:
        wrong = difference(tree_of(stage.trial), reference.after)
        return f"started again, status 0: {wrong}" if wrong else ""
    if again.status == 2 and len(again.lines) == 1:
        return ""
    return f"started again, status {again.status}: {last_line(again)}"
