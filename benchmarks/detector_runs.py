"""Does it matter when LAEP prunes? Whole runs with 2,000 warm-up steps, pruned at the detector's moment and at others.

    python benchmarks/fetch_text.py TEXT && python benchmarks/detector_runs.py TEXT --work WORK

All runs of one seed see the same tokens in the same order from the same weights. The run without pruning tells, by its
loads, when the detector of the release before would have fired. Runs are `secateur pretrain` in processes of one
thread, two at a time; a finished run in WORK is not repeated.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import secateur
from detector_candidates import spearman
from laep_quality import write_code
from record import parser_for, show, store

STEPS, WARMUP, BATCH, LENGTH = 5000, 2000, 32, 128
SECONDS = 900  # a run, on one core
TARGET = "0.75"  # of the parameters stay
FIXED = (500, 1000, 2000, 3000, 4000)
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 32, "head_dim": 8}
OLD_CORRELATION, OLD_DISTANCE = 0.97, 0.05  # of the release before, over three windows, in 95 % of the layers


def run(work: Path, text: Path, name: str, seed: int, options: list[str], script: str | None = None) -> dict[str, Any]:
    """A finished run's report, with its folder."""
    out = work / f"{name}-seed{seed}"
    if not (out / "report.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        domains = ("code", "manuals", "dictionary", "speeches")
        words = [part for domain in domains for part in ("--data", f"{domain}={text / domain}.jsonl")]
        words += [part for field, value in MODEL.items() for part in ("--set", f"{field}={value}")]
        sizes = {"steps": STEPS, "warmup-steps": WARMUP, "batch-size": BATCH, "sequence-length": LENGTH}
        sizes |= {"vocab-size": 2048, "max-data-bytes": 24_000_000, "seed": seed, "threads": 1}
        sizes |= {"eval-steps": 500, "save-steps": 1000}
        words += [part for option, value in sizes.items() for part in (f"--{option}", str(value))]
        begin = [sys.executable, *([script] if script else ["-m", "secateur"]), "pretrain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [*begin, *words, "--learning-rate", "1e-3", *options, "--out", str(out), "--quiet"]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        print(f"{out.name}: done", flush=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return {
        "seed": seed,
        "folder": out.name,
        "validation_loss": report["validation_loss"],
        "pruned_at_step": [event["step"] for event in report["events"]],
        "rerouted_share": [event["rerouted_share"] for event in report["events"]],
        "parameters": report["parameters"],
    }


def old_step(folder: Path) -> int | None:
    """When the detector of the release before would have fired on the loads of a run without pruning."""
    lines = [json.loads(line) for line in (folder / "loads.jsonl").read_text().splitlines()]
    shares = [np.array(list(line["layers"].values()), dtype=float) for line in lines]
    shares = [one / one.sum(1, keepdims=True) for one in shares]
    streak = np.zeros(len(shares[0]))
    for line, before, now in zip(lines[1:], shares, shares[1:], strict=False):
        distance = np.abs(before - now).sum(1) / 2
        holds = (spearman(before, now) >= OLD_CORRELATION) & (distance <= OLD_DISTANCE)
        streak = np.where(holds, streak + 1, 0)
        if (streak >= 2).mean() >= 0.95:
            return int(line["step"])
    return None


def arms(work: Path, text: Path, seed: int) -> dict[str, dict[str, Any]]:
    """All runs of one seed by their names; one that would not prune is left out."""
    found = {"base": run(work, text, "base", seed, ["--no-prune"])}
    goal = ["--target-params", TARGET]
    found["detector"] = run(work, text, "detector", seed, goal)
    replayed = secateur.phases(work / found["base"]["folder"]).stable_at
    assert [replayed] == (found["detector"]["pruned_at_step"] or [None]), "a replay and the run disagree"
    if replayed is not None:
        at = [*goal, "--prune-at-step", str(replayed)]
        script = str(Path(__file__).parent / "laep_random.py")
        found["random experts, same step"] = run(work, text, "random", seed, at, script)
    if (old := old_step(work / found["base"]["folder"])) is not None:
        found["detector of before"] = run(work, text, "before", seed, [*goal, "--prune-at-step", str(old)])
    for step in FIXED:
        found[f"step {step}"] = run(work, text, f"step{step}", seed, [*goal, "--prune-at-step", str(step)])
    return found


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_code(arguments.text)
    print(f"{arguments.seeds} seeds x {4 + len(FIXED)} runs x about {SECONDS} s, two at a time", flush=True)
    with ThreadPoolExecutor(2) as pool:
        by_seed = list(pool.map(lambda seed: arms(arguments.work, arguments.text, seed), range(arguments.seeds)))
    rows = [_row(name, by_seed) for name in dict.fromkeys(name for found in by_seed for name in found)]
    columns = ["run", "seeds", "pruned at step", "validation loss", "minus base, same seed"]
    show(
        f"{STEPS} steps of {BATCH * LENGTH:,} tokens, {WARMUP} of them warm-up; mean ± standard deviation",
        columns,
        rows,
    )
    record = {"steps": STEPS, "warmup": WARMUP, "model": MODEL, "target_params": TARGET, "runs": by_seed}
    print(store("detector_runs", {**record, "table": [columns, *rows]}, stored=arguments.store))


def _row(name: str, by_seed: list[dict[str, dict[str, Any]]]) -> list[str]:
    ones = [(found[name], found["base"]) for found in by_seed if name in found]
    steps = ", ".join(str(step) for one, _ in ones for step in one["pruned_at_step"]) or "-"
    losses = [one["validation_loss"] for one, _ in ones]
    differences = [one["validation_loss"] - base["validation_loss"] for one, base in ones]
    return [name, str(len(ones)), steps, _spread(losses, ""), _spread(differences, "+")]


def _spread(values: list[float], sign: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
