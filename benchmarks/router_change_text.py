"""Which experts does a fine-tuned language model need? Router change against criteria that look at data.

    python benchmarks/fetch_text.py TEXT && python benchmarks/router_change_text.py TEXT --work WORK --pretrain

A MoE that `secateur pretrain` made of three domains is fine-tuned by `finetune` on a fourth, which it never saw, with
several seeds. Of every fine-tuned model a quarter, a half and three quarters of the experts of each layer go, by each
criterion; what is left is measured on held-out text of the new domain and of the others, then fine-tuned further for
the same few steps and measured again. Criteria on data observe other text of the new domain. What the change of the
router rows follows is told by its rank correlation, over the experts of a layer, with their loads on that text. A run
that WORK holds is not repeated. Its result is router_change_text.json and images/router-change-text.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from criteria import blocks, observed, split, train
from record import docs_in, parser_for, show, store
from secateur.criteria import CRITERIA
from secateur.criteria.router_change import router_norm_change
from secateur.decide.by_score import plan_by_criterion
from secateur.decide.keep import Keep
from secateur.families import describe_moe
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.run import run_finetuning
from secateur.model_folder.measure.router_change import router_changes
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.stats import RouterStats

NEW, OTHERS = "speeches", ("code", "manuals", "dictionary")
COMPARED = (
    "router_norm_change",
    "router_norm_absolute_change",
    "router_difference_norm",
    "reap",
    "frequency",
    "random",
)
PRUNED = (0.25, 0.5, 0.75)
NONE = "no pruning"
LENGTH = 256
COLUMNS = ["criterion", "experts pruned", "new domain", "new, tuned again", "other domains", "other, tuned again"]


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="what to fine-tune; WORK/base/model without it")
    parser.add_argument("--pretrain", action="store_true", help="make WORK/base/model if it is not there")
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300, help="of the fine-tuning")
    parser.add_argument("--further-steps", type=int, default=30, help="of the fine-tuning after the pruning")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings, and draws of the criterion random")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = texts_of(arguments.text, arguments.work)
    base, command = base_model(arguments, texts)
    runs = [run for seed in range(arguments.seeds) for run in runs_of(arguments, texts, base, seed)]
    rows = [row(runs, name, share) for name, share in combinations()]
    show(f"perplexity; fine-tuned on {NEW}", COLUMNS, rows)
    draw(runs, docs_in(arguments.store, "images"))
    tunings = {seed: arguments.work / f"tuned-{seed}" for seed in range(arguments.seeds)}
    loads = {seed: loads_of(base, tuned, texts) for seed, tuned in tunings.items()}
    follows = {seed: followed(base, tuned, loads[seed]) for seed, tuned in tunings.items()}
    record = {
        "sources": json.loads((arguments.text / "sources.json").read_text()),
        "pretrain": command,
        "pretrained_on": OTHERS,
        "finetuned_on": NEW,
        "steps": arguments.steps,
        "further_steps": arguments.further_steps,
        "learning_rate": arguments.learning_rate,
        "rank_correlation_of_router_norm_change": follows,
        "loads": loads,
        "runs": runs,
    }
    for what in follows[0]:
        found = sorted(one for by_layer in follows.values() for one in by_layer[what].values())
        print(f"change and {what}: {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})")
    print(store("router_change_text", {**record, "table": [COLUMNS, *rows]}, stored=arguments.store))


def combinations() -> list[tuple[str, float]]:
    return [(NONE, 0.0), *((name, share) for share in PRUNED for name in COMPARED)]


def texts_of(text: Path, work: Path) -> dict[str, dict[str, Path]]:
    """{part: {domain: file}}; of the new domain's training text and of the held-out text, a piece of every document."""
    parts = split(text, work)
    parts["tuning"] = {NEW: excerpts(parts["training"][NEW], work / "tuning.jsonl", 2_400_000)}
    parts["measured"] = {
        domain: excerpts(file, work / f"measured-{domain}.jsonl", 32_000) for domain, file in parts["held-out"].items()
    }
    return parts


def excerpts(file: Path, out: Path, characters: int) -> Path:
    """So many characters in all, the beginnings of all documents."""
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    out.write_text("".join(json.dumps({"text": text[: characters // len(texts)]}) + "\n" for text in texts))
    return out


def base_model(arguments: argparse.Namespace, texts: dict[str, dict[str, Path]]) -> tuple[Path, list[str] | None]:
    """The model to fine-tune, and how it was made, where that was here."""
    if arguments.model is not None:
        return arguments.model, None
    run = arguments.work / "base"
    if not (arguments.pretrain or (run / "report.json").exists()):
        raise SystemExit(f"{run}: no model there; --pretrain makes one, --model names another")
    training = {domain: texts["training"][domain] for domain in OTHERS}
    return run / "model", train(training, run, arguments.pretrain_steps, "mixtral")


def runs_of(
    arguments: argparse.Namespace, texts: dict[str, dict[str, Path]], base: Path, seed: int
) -> list[dict[str, Any]]:
    """The model of one seed, pruned in every way and fine-tuned further."""
    tuned = arguments.work / f"tuned-{seed}"
    options = FinetuneOptions(
        data=(f"{NEW}={texts['tuning'][NEW]}",),
        eval_data=tuple(f"{domain}={file}" for domain, file in texts["measured"].items()),
        sequence_length=LENGTH,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=seed,
        save_steps=0,
    )
    if not tuned.exists():
        run_finetuning(base, tuned, options)
        print(f"seed {seed}: fine-tuned", flush=True)
    changed = json.loads((tuned / "finetune.json").read_text())["evaluations"]
    further = FinetuneOptions(**{**options.to_json(), "steps": arguments.further_steps, "seed": seed + 100})
    inputs: dict[str, Any] = {}
    runs = []
    for name, share in combinations():
        place = arguments.work / f"run-{seed}-{name.replace(' ', '-')}-{share}.json"
        if not place.exists():
            inputs = inputs or inputs_of(tuned, base, texts)
            found = pruned_and_tuned(tuned, name, share, seed, inputs, further)
            found["before_fine_tuning"] = changed[0]["domains"]
            place.write_text(json.dumps(found, indent=1))
            print(f"seed {seed}, {name}, {share:.0%}: {perplexity(found, 'before', (NEW,)):.2f}", flush=True)
        runs.append(json.loads(place.read_text()))
    return runs


def inputs_of(tuned: Path, base: Path, texts: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """What the criteria look at: routers before and after, and statistics on text of the new domain."""
    return {
        "router change": router_changes(tuned, read_model_folder(base)),
        "stats": seen_by(tuned, texts),
        "limits": model_facts(read_model_folder(tuned)).limits(),
    }


def seen_by(folder: Path, texts: dict[str, dict[str, Path]]) -> RouterStats:
    """Statistics on text of the new domain, the same text for every model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    text = blocks(AutoTokenizer.from_pretrained(folder), texts["calibration"], (NEW,), 64, 0)
    return observed(describe_moe(model), text)


def loads_of(base: Path, tuned: Path, texts: dict[str, dict[str, Path]]) -> dict[str, dict[str, list[int]]]:
    """{layer: tokens of each expert on text of the new domain, before and after the fine-tuning}."""
    before, after = (seen_by(folder, texts).loads() for folder in (base, tuned))
    return {str(layer): {"before": before[layer], "after": after[layer]} for layer in before}


def followed(base: Path, tuned: Path, loads: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, float]]:
    """{what: {layer: rank correlation of router_norm_change with it, over experts}}."""
    found: dict[str, dict[str, float]] = {"load": {}, "growth of the load": {}}
    for layer, change in router_changes(tuned, read_model_folder(base)).items():
        score = router_norm_change(change).tolist()
        before, after = loads[str(layer)]["before"], loads[str(layer)]["after"]
        growth = [now - then for now, then in zip(after, before, strict=True)]
        for what, values in zip(found, (after, growth), strict=True):
            found[what][str(layer)] = float(spearmanr(score, values).statistic)
    return found


def pruned_and_tuned(
    tuned: Path, name: str, share: float, seed: int, inputs: dict[str, Any], further: FinetuneOptions
) -> dict[str, Any]:
    """What was measured of one pruning, before and after further fine-tuning."""
    with tempfile.TemporaryDirectory() as folder:
        model, dropped = tuned, {}
        if name != NONE:
            criterion = CRITERIA[name]
            plan = plan_by_criterion(
                name,
                Keep(share=1 - share),
                inputs["limits"],
                stats=inputs["stats"] if criterion.needs_data else None,
                weights=inputs.get(str(criterion.needs)),
                seed=seed,
                protect=False,
            )
            model = Path(folder) / "pruned"
            apply_to_model(tuned, plan, model)
            dropped = {str(layer): list(one.dropped) for layer, one in plan.layers.items()}
        record = run_finetuning(model, Path(folder) / "again", further)
    before, after = (record["evaluations"][at]["domains"] for at in (0, -1))
    return {"seed": seed, "criterion": name, "pruned": share, "dropped": dropped, "before": before, "after": after}


def perplexity(run: dict[str, Any], when: str, domains: Sequence[str]) -> float:
    return math.exp(statistics.mean(run[when][domain]["loss"] for domain in domains))


def numbers(runs: list[dict[str, Any]], name: str, share: float, when: str, domains: Sequence[str]) -> list[float]:
    """One a seed."""
    mine = [run for run in runs if (run["criterion"], run["pruned"]) == (name, share)]
    return [perplexity(run, when, domains) for run in mine]


def row(runs: list[dict[str, Any]], name: str, share: float) -> list[str]:
    cells = [name, f"{share:.0%}"]
    for domains in ((NEW,), OTHERS):
        for when in ("before", "after"):
            found = numbers(runs, name, share, when, domains)
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}")
    return cells


def draw(runs: list[dict[str, Any]], images: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for panel, when, title in zip(panels, ("before", "after"), ("pruned", "pruned, then tuned again"), strict=True):
        for name in COMPARED:
            shares = [0.0, *PRUNED]
            found = [numbers(runs, name if share else NONE, share, when, (NEW,)) for share in shares]
            means = [statistics.mean(one) for one in found]
            panel.fill_between(shares, [min(one) for one in found], [max(one) for one in found], alpha=0.12)
            panel.plot(shares, means, marker="o", label=name)
        panel.set(title=title, xlabel="share of the experts of each layer pruned", yscale="log")
        panel.set_yticks([30, 50, 100, 200, 500], labels=["30", "50", "100", "200", "500"], minor=False)
        panel.set_yticks([], minor=True)
    panels[0].set_ylabel(f"perplexity on held-out {NEW}")
    panels[1].legend(fontsize=8, title="mean and range over seeds", title_fontsize=8, loc="upper left")
    figure.savefig(images / "router-change-text.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
