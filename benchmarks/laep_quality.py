"""Does pruning in training cost quality? Base, LAEP and both auxiliary losses on four text domains.

    python benchmarks/fetch_text.py TEXT && python benchmarks/laep_quality.py TEXT --work WORK

All runs of one seed see the same tokens in the same order. Runs are `secateur pretrain` in processes of one thread,
two at a time; a finished run in WORK is not repeated. Its result is laep_quality.json, with per-domain losses.
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

from record import parser_for, show, store

SETTINGS: dict[str, list[str]] = {
    "base": ["--no-prune"],
    "LAEP target 0.75": ["--target-params", "0.75"],
    "LAEP alpha 0.2": ["--alpha", "0.2"],
    "Mixtral auxiliary loss": ["--no-prune", "--balance", "mixtral"],
    "DeepSeek-V3 auxiliary loss": ["--no-prune", "--balance", "deepseek_v3"],
    "LAEP beta 0.1": ["--beta", "0.1"],  # half of the parameters go at this size: where it does not help
}


def command(text: Path, seed: int, steps: int, extra: list[str]) -> list[str]:
    data = ["--data", "code=" + str(text / "code.jsonl")]
    for domain in ("manuals", "dictionary", "speeches"):
        data += ["--data", f"{domain}={text / domain}.jsonl"]
    sizes = ["--steps", str(steps), "--max-data-bytes", "12000000", "--vocab-size", "2048", "--seed", str(seed)]
    every = ["--eval-steps", "100", "--save-steps", "1000", "--threads", "1"]
    return [sys.executable, "-m", "secateur", "pretrain", *data, *sizes, *every, *extra]


def write_code(text: Path) -> None:
    """The standard library as a .jsonl, so that it gets the same weight as the other domains."""
    from secateur.data.corpus import read_documents

    if (text / "code.jsonl").exists():
        return
    lines, size = [], 0
    for document in read_documents(()):
        size += len(document.text.encode()) if document.domain == "code" else 0
        if size > 6_000_000:
            break
        lines.append(json.dumps({"text": document.text}) + "\n")
    (text / "code.jsonl").write_text("".join(lines))


def run(work: Path, text: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    out = work / f"{name.replace(' ', '-').lower()}-seed{seed}"
    if not (out / "report.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        arguments = [*command(text, seed, steps, SETTINGS[name]), "--out", str(out), "--quiet"]
        subprocess.run(arguments, check=True, env=environment, stdout=subprocess.DEVNULL)
        print(f"{name}, seed {seed}: done", flush=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    first = report["events"][0]["parameters_before"] if report["events"] else report["parameters"]
    return {
        "seed": seed,
        "validation_loss": report["validation_loss"],
        "by_domain": report["validation_loss_by_domain"],
        "parameters_removed": 1 - report["parameters"] / first,
        "pruned_at_step": [event["step"] for event in report["events"]],
        "rerouted_share": [event["rerouted_share"] for event in report["events"]],
        "tokens_per_second": report["tokens_per_second"],
    }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_code(arguments.text)
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in SETTINGS]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda job: run(arguments.work, arguments.text, *job, arguments.steps), jobs))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for (name, _), result in zip(jobs, runs, strict=True):
        results[name].append(result)
    first = next(iter(results.values()))
    base = {one["seed"]: one["validation_loss"] for one in first}
    domains = sorted(first[0]["by_domain"])
    rows = []
    for name, ones in results.items():
        losses = [one["validation_loss"] for one in ones]
        differences = [one["validation_loss"] - base[one["seed"]] for one in ones]
        rows.append(
            [
                name,
                f"{statistics.mean(one['parameters_removed'] for one in ones):.1%}",
                f"{statistics.mean(losses):.4f} ± {_spread(losses):.4f}",
                f"{statistics.mean(differences):+.4f} ± {_spread(differences):.4f}",
            ]
            + [f"{statistics.mean(one['by_domain'][domain] for one in ones):.4f}" for domain in domains]
        )
    columns = ["run", "parameters removed", "validation loss", "minus base, same seed", *domains]
    show(f"{arguments.seeds} seeds, {arguments.steps} steps of 2,048 tokens; mean ± standard deviation", columns, rows)
    sources = json.loads((arguments.text / "sources.json").read_text())
    record = {"steps": arguments.steps, "sources": sources, "settings": SETTINGS, "runs": results}
    print(store("laep_quality", {**record, "table": [columns, *rows]}, stored=arguments.store))


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
