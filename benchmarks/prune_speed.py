"""Speed and memory of the whole `secateur prune`, all checks made, against a plain copy of its result.

    python benchmarks/prune_speed.py /big/disk/folder --gigabytes 2.5

A synthetic Qwen3-MoE of that size, with a tokenizer, is written to the folder and kept there for the next time. Then in
turns, once with the files in the page cache and once without: `cp` and `sync` of the weights that the last pruning
wrote, `apply`, `prune` by a criterion without data with and without its sample, and once each `observe` and `prune` on
data. Every command runs in a process of its own; its seconds leave out the start of Python and its imports, which are
told apart. A ratio is that of one turn, and the smallest counts: others may use the machine. At the end, where a memory
control group can be made, `prune` runs with half as many bytes of memory as the checkpoint has. Its result is
prune_speed.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from apply_speed import checkpoint, fresh
from memory_limit import run_limited, why_not
from record import parser_for, show, store

# What a child does; it tells its seconds without the imports, its peak memory, what it read, and its checks.
CHILD = """
import json, sys, time
begun = time.perf_counter()
import torch, transformers
import secateur
import secateur.model_folder.prune, secateur.model_folder.measure.on_text, secateur.folder_kinds.apply
import secateur.model_folder.checks.computes, secateur.criteria
source, data, out = sys.argv[1:4]
data_words = dict(data=[data], samples=16, sequence_length=256, batch_size=8)
start, worked = time.perf_counter(), time.process_time()
checks = []
%s
seconds, worked = time.perf_counter() - start, time.process_time() - worked
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
io = dict(line.split(": ") for line in open("/proc/self/io"))
print(json.dumps({
    "seconds": seconds, "processor_seconds": worked, "start": start - begun,
    "peak_memory_bytes": int(status["VmHWM"].split()[0]) * 1024,
    "read_by_calls": int(io["rchar"]), "read_from_disk": int(io["read_bytes"]),
    "checks": [[check.claim, check.passed, check.detail] for check in checks]}))
"""
PRUNE = "secateur.prune(source, out, keep=0.75, criterion={criterion!r}, verify_tokens={tokens}{more})"
WORK = {
    "apply": "secateur.apply(source, source + '.plan.json', out)",
    "prune, bytes only": "checks = " + PRUNE.format(criterion="weight_norm", tokens=0, more="") + ".checks",
    "prune": "checks = " + PRUNE.format(criterion="weight_norm", tokens=32, more="") + ".checks",
    "observe": "secateur.observe(source, out, force=True, **data_words)",
    "prune on data": "checks = " + PRUNE.format(criterion="reap", tokens=32, more=", **data_words") + ".checks",
}
EVERY_TURN = ("apply", "prune, bytes only", "prune")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("folder", type=Path, help="on a disk with room for four times the size")
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the checkpoint, at least")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-data", action="store_true", help="leave out observe, and prune on data")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    source = with_tokenizer(checkpoint(folder, arguments.gigabytes, arguments.hidden))
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text()))
    result: dict[str, Any] = {"source_bytes": size, "load_before": os.getloadavg()}
    copied = folder / "result"  # whose plan `apply` takes, and whose bytes `cp`
    if not copied.is_dir():
        work("prune, bytes only", source, folder, cold=False)
        shutil.copy(folder / "prune, bytes only" / "plan.json", f"{source}.plan.json")
        (folder / "prune, bytes only").rename(copied)
    result["kept_bytes"] = sum(path.stat().st_size for path in copied.glob("*.safetensors"))
    result["turns"] = [
        turn(source, folder, copied, cold=cold, data=number == 0 and not arguments.no_data)
        for number in range(arguments.turns)
        for cold in (False, True)
    ]
    result["start_seconds"] = min(one["apply"]["start"] for one in result["turns"])
    result["limited"] = limited(source, folder, size // 2) if why_not() is None else why_not()
    result["load_after"] = os.getloadavg()
    result["table"] = report(result)
    print(f"stored in {store('prune_speed', result, stored=arguments.store)}")


def with_tokenizer(source: Path) -> Path:
    from secateur.data.tokenizer import train_tokenizer

    if not (source / "tokenizer.json").is_file():
        train_tokenizer(text(), vocab_size=400).save_pretrained(source)
    return source


def text() -> list[str]:
    """Of Python itself; what it says does not matter here."""
    lines = Path(json.__file__).read_text(encoding="utf-8").splitlines()
    return [" ".join(lines[at : at + 40]) for at in range(0, len(lines), 4)]


def turn(source: Path, folder: Path, copied: Path, *, cold: bool, data: bool) -> dict[str, Any]:
    """Seconds of a copy and of every command, one after another."""
    found: dict[str, Any] = {"cold": cold} | copy(copied, folder, cold=cold)
    for name in WORK if data else EVERY_TURN:
        found[name] = work(name, source, folder, cold=cold)
    return found


def copy(copied: Path, folder: Path, *, cold: bool) -> dict[str, float]:
    """Seconds of a plain copy that is on the disk when it ends, and those of the processor."""
    target = fresh(folder / "copy")
    target.mkdir()
    weights = sorted(copied.glob("*.safetensors"))
    cached(weights, cold=cold)
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", *map(str, weights), str(target)], check=True)
    subprocess.run(["sync", *(str(target / path.name) for path in weights)], check=True)
    after = os.times()
    worked = sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
    return {"copy": time.perf_counter() - start, "copy_processor": worked}


def work(name: str, source: Path, folder: Path, *, cold: bool) -> dict[str, Any]:
    cached(sorted(source.glob("*.safetensors")), cold=cold)
    done = subprocess.run(words(name, source, folder), stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def words(name: str, source: Path, folder: Path) -> list[str]:
    out = fresh(folder / name)
    if out.is_file():
        out.unlink()
    return [sys.executable, "-c", CHILD % WORK[name], str(source), str(folder / "text.jsonl"), str(out)]


def cached(paths: list[Path], *, cold: bool) -> None:
    """Put files into the page cache, or out of it."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            buffer = bytearray(2**22)
            while file.readinto(buffer):
                pass


def limited(source: Path, folder: Path, limit: int) -> dict[str, Any]:
    """`prune` with so many bytes of memory."""
    cached(sorted(source.glob("*.safetensors")), cold=True)
    done = run_limited(words("prune", source, folder), limit)
    told: dict[str, Any] = {"limit": limit, "status": done.status, "peak_of_group": done.peak}
    return told | (json.loads(done.output.splitlines()[-1]) if done.status == 0 else {"errors": done.errors[-500:]})


def report(result: dict[str, Any]) -> list[list[str]]:
    """Print the table, and give it: of every command the turn in which it took least, against the copy of that turn."""
    rows = []
    for cold in (False, True):
        turns = [one for one in result["turns"] if one["cold"] == cold]
        state = "cold" if cold else "warm"
        seconds, worked = min((one["copy"], one["copy_processor"]) for one in turns)
        rows.append([f"{state}: cp, sync", f"{seconds:.1f}", "1.0", f"{worked:.1f}", "", ""])
        for name in WORK:
            ratios = {one[name]["seconds"] / one["copy"]: one[name] for one in turns if name in one}
            if ratios:
                least = ratios[min(ratios)]
                rows.append([f"{state}: {name}", *numbers(least["seconds"], min(ratios), least)])
    if isinstance(found := result["limited"], dict) and found["status"] == 0:
        made = sum(passed is True for _, passed, _ in found["checks"])
        name = f"prune in {found['limit'] / 2**20:.0f} MiB: {made} of {len(found['checks'])} checks passed"
        rows.append([name, *numbers(found["seconds"], None, found)])
    columns = ["", "seconds", "times the copy", "of the processor", "peak MiB", "GB read"]
    title = f"{result['source_bytes'] / 1e9:.2f} GB -> {result['kept_bytes'] / 1e9:.2f} GB"
    show(title, columns, rows)
    print(f"start of Python and imports: {result['start_seconds']:.1f} s; load {result['load_before'][0]:.1f} before")
    return [columns, *rows]


def numbers(seconds: float, ratio: float | None, told: dict[str, Any]) -> list[str]:
    return [
        f"{seconds:.1f}",
        "" if ratio is None else f"{ratio:.1f}",
        f"{told['processor_seconds']:.1f}",
        f"{told['peak_memory_bytes'] / 2**20:.0f}",
        f"{told['read_by_calls'] / 1e9:.1f}",
    ]


if __name__ == "__main__":
    main()
