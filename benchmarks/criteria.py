"""Which criterion keeps a model best? Every one of the table, with a quarter and with half of the experts pruned.

    python benchmarks/fetch_text.py TEXT && python benchmarks/criteria.py TEXT --work WORK

Two MoEs are pre-trained by `secateur pretrain` on four domains, one without and one with a balance loss. Two domains
are calibrated on, with other blocks of text for every seed; loss is measured on held-out text of these two and of the
other two. The three parts of a domain, to train, to calibrate and to hold out, share no document. The experts that a
plan drops are barred from the routers, which computes what the pruned model would, bit for bit
(tests/model_folder/test_families_on_disk.py). A finished training in WORK is not repeated. Its
result is criteria.json, with how the models were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laep_quality import write_code
from record import parser_for, show, store
from secateur.criteria import CRITERIA
from secateur.data.batch import Batch
from secateur.data.calibration import calibrate
from secateur.decide.by_score import plan_by_criterion
from secateur.decide.keep import Keep
from secateur.families import MoEModel, describe_moe
from secateur.model_folder.evaluation.perplexity import BlockLosses, block_losses
from secateur.model_folder.measure.weights import weight_stats
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.observation.activations import ActivationObserver
from secateur.plans import Plan
from secateur.stats import RouterStats
from secateur.surgery.oracle import barred_experts

CALIBRATED, OTHER = ("code", "manuals"), ("dictionary", "speeches")
PARTS = {"training": 8, "calibration": 1, "held-out": 1}  # shares of the documents, in tenths
MODELS = {"no balance loss": "none", "Mixtral's balance loss": "mixtral"}
SHARES = (0.75, 0.5)
LENGTH, BATCH = 256, 8


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of the pre-training")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the calibration text")
    parser.add_argument("--samples", type=int, default=64, help="blocks of a calibration, and of a held-out domain")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    parts = split(arguments.text, arguments.work)
    models = {
        name: results_of(arguments, parts, arguments.work / f"run-{balance}", balance)
        for name, balance in MODELS.items()
    }
    columns = ["model", "criterion", "experts kept", "same domains", "other domains"]
    rows = [[name, *row(one, found["unpruned_loss"])] for name, found in models.items() for one in found["results"]]
    show("more loss a token than the model before pruning", columns, rows)
    record = {
        "sources": json.loads((arguments.text / "sources.json").read_text()),
        "calibrated_on": CALIBRATED,
        "not_calibrated_on": OTHER,
        "tokens_a_calibration": arguments.samples * LENGTH,
        "held_out_tokens_a_domain": arguments.samples * LENGTH,
        "models": models,
    }
    print(store("criteria", {**record, "table": [columns, *rows]}, stored=arguments.store))


def results_of(
    arguments: argparse.Namespace, parts: dict[str, dict[str, Path]], run: Path, balance: str
) -> dict[str, Any]:
    """One model, pruned in every way."""
    command = train(parts["training"], run, arguments.steps, balance)
    folder = run / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    moe = describe_moe(model)
    held_out = {
        domain: blocks(tokenizer, parts["held-out"], (domain,), arguments.samples, 0)
        for domain in (*CALIBRATED, *OTHER)
    }
    stats = [
        observed(moe, blocks(tokenizer, parts["calibration"], CALIBRATED, arguments.samples, seed))
        for seed in range(arguments.seeds)
    ]
    source = read_model_folder(folder)
    weights = {needs: weight_stats(source, needs) for needs in ("expert weights", "router weights")}
    limits = model_facts(source).limits()
    results: list[dict[str, Any]] = []
    for share in SHARES:
        for name, criterion in CRITERIA.items():
            if criterion.needs == "router change":
                continue  # these models were not fine-tuned from others
            draws = range(arguments.seeds) if criterion.needs_data or criterion.needs == "nothing" else range(1)
            runs = []
            for seed in draws:
                plan = plan_by_criterion(
                    name,
                    Keep(share=share),
                    limits,
                    stats=stats[seed] if criterion.needs_data else None,
                    weights=weights.get(str(criterion.needs)),
                    seed=seed,
                    protect=False,
                )
                runs.append({"seed": seed, "loss": pruned_losses(moe, plan, held_out), "dropped": dropped(plan)})
            results.append({"criterion": name, "keep": share, "runs": runs})
            print(
                f"{balance}, {name}, keep {share}: {[round(mean(one['loss'], CALIBRATED), 4) for one in runs]}",
                flush=True,
            )
    return {
        "pretrain": command,
        "model": model_facts(source).to_json(),
        "loads": {str(layer): loads for layer, loads in stats[0].loads().items()},
        "unpruned_loss": losses(model, held_out),
        "results": results,
    }


def split(text: Path, work: Path) -> dict[str, dict[str, Path]]:
    """{part: {domain: file}}; a document's part is decided by its content alone, so copies stay together."""
    write_code(text)
    ends = [part for part, tenths in PARTS.items() for _ in range(tenths)]
    files = {part: {domain: work / part / f"{domain}.jsonl" for domain in (*CALIBRATED, *OTHER)} for part in PARTS}
    for domain in (*CALIBRATED, *OTHER):
        lines: dict[str, list[str]] = {part: [] for part in PARTS}
        for line in (text / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            number = hashlib.sha256(json.loads(line)["text"].encode()).digest()[0]
            lines[ends[number % len(ends)]].append(line)
        for part, mine in lines.items():
            files[part][domain].parent.mkdir(exist_ok=True)
            files[part][domain].write_text("".join(mine), encoding="utf-8")
    return files


def train(texts: dict[str, Path], out: Path, steps: int, balance: str) -> list[str]:
    """Pre-train, unless it is done; the command without folders."""
    data = [word for domain, path in texts.items() for word in ("--data", f"{domain}={path}")]
    sizes = ["--steps", str(steps), "--max-data-bytes", "12000000", "--vocab-size", "2048", "--no-prune"]
    sizes += ["--balance", balance]
    if not (out / "report.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "secateur", "pretrain", *data, *sizes, "--out", str(out), "--quiet"]
        subprocess.run(command, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    shown = [word for domain, path in texts.items() for word in ("--data", f"{domain}={path.name}")]
    return ["secateur", "pretrain", *shown, *sizes]


def blocks(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, Path], domains: Sequence[str], samples: int, seed: int
) -> list[Batch]:
    specs = [f"{domain}={texts[domain]}" for domain in domains]
    drawn = calibrate(tokenizer, specs, samples=samples, sequence_length=LENGTH, seed=seed)
    return drawn.batches(BATCH)


@torch.no_grad()
def observed(moe: MoEModel, batches: list[Batch]) -> RouterStats:
    """With all that the criteria read, also the sums that are recorded on request only."""
    observer = ActivationObserver(moe, sums=[name for criterion in CRITERIA.values() for name in criterion.sums])
    for batch in batches:
        moe.model(input_ids=batch.input_ids, use_cache=False)
    stats = observer.read()
    observer.detach()
    return stats


@torch.no_grad()
def losses(model: PreTrainedModel, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    """{domain: loss a token}."""
    found = {}
    for domain, batches in held_out.items():
        parts = [
            block_losses(model(input_ids=batch.input_ids, use_cache=False).logits, batch.input_ids, None)
            for batch in batches
        ]
        found[domain] = BlockLosses.joined(parts).mean
    return found


def pruned_losses(moe: MoEModel, plan: Plan, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    with barred_experts(moe, plan):
        return losses(moe.model, held_out)


def dropped(plan: Plan) -> dict[str, list[int]]:
    return {str(layer): list(one.dropped) for layer, one in plan.layers.items()}


def mean(loss: dict[str, float], domains: Sequence[str]) -> float:
    return statistics.mean(loss[domain] for domain in domains)


def row(one: dict[str, Any], whole: dict[str, float]) -> list[str]:
    cells = [one["criterion"], f"{one['keep']:.0%}"]
    for domains in (CALIBRATED, OTHER):
        more = [mean(run["loss"], domains) - mean(whole, domains) for run in one["runs"]]
        spread = f" ± {statistics.stdev(more):.4f}" if len(more) > 1 else ""
        cells.append(f"{statistics.mean(more):+.4f}{spread}")
    return cells


if __name__ == "__main__":
    main()
