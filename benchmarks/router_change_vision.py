"""Pruning fine-tuned V-MoE by router change (arXiv 2405.16646): accuracy, size and cost against other criteria.

    python benchmarks/fetch_images.py IMAGES && python benchmarks/router_change_vision.py IMAGES --work WORK

Pre-trains a small V-MoE on Fashion-MNIST, fine-tunes it on CIFAR-10 (10,000 images, a split of our own: the numbers
compare with one another and with nothing published) and on 5,000 images of MNIST, and prunes every MoE layer to 6, 4
and 2 of 8 experts by the change of the router norm, by importance (total gate weight), by frequency and at random. Both
meanings of a removed expert, and for the first also after fine-tuning once more; on MNIST also with expert choice and
as an ensemble (E3) from the same pre-trained weights. Every result is a file in WORK and is not computed twice. Time an
image is process time of one thread, the models in turn. Its result is router_change_vision.json and
images/router-change-vision.png.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from record import docs_in, parser_for, show, store
from secateur.data.images import read_images
from secateur.decide.keep import Keep
from secateur.files.atomic import atomic_write
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.run import run_finetuning
from secateur.model_folder.choice import Choice, decide_plan
from secateur.model_folder.evaluation.on_images import evaluate_images
from secateur.model_folder.measure.image_batches import batches_for, draw
from secateur.model_folder.measure.on_images import ImageObservation, loaded
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.read.tensor_files import CONFIG
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.source import of_folder, of_observation
from secateur.models.vmoe import VMoEConfig, VMoEForImageClassification
from secateur.models.vmoe.pixels import default_pixels
from secateur.observation.observation import Observation

EXPERTS = 8
MODEL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "moe_layers": [1, 3, 5],
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_labels": 10,
    "group_images": 8,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 1.5,
}
KEEPS = (6, 4, 2)
# criterion -> its name in the table
CRITERIA = {
    "router_norm_change": "router norm change",
    "soft_frequency": "importance",
    "frequency": "frequency",
    "random": "random",
}
REMOVED = ("reroute", "zero-slot")
NEVER_SAVED: dict[str, Any] = {"save_steps": 0, "log_steps": 50}
# weight decay only here: in fine-tuning it would shorten router rows by itself
PRETRAINING: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "batch_size": 64,
    **NEVER_SAVED,
}
WAYS = [("none", EXPERTS), *((criterion, keep) for criterion in CRITERIA for keep in KEEPS)]
ROUNDS, TIMED = 25, 256  # of timing, and its images


@dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuning: its images, its options, those of the fine-tuning after pruning if there is one, and what is
    changed in the config of the pre-trained model before it.
    """

    name: str
    images: str
    title: str
    first: dict[str, Any]
    again: dict[str, Any] | None = None
    changes: dict[str, Any] | None = None


CIFAR: dict[str, Any] = {"epochs": 8, "learning_rate": 1e-3, "batch_size": 32}
MNIST: dict[str, Any] = {"epochs": 10, "learning_rate": 1e-3, "batch_size": 32}
TASKS = (
    Task(
        name="cifar",
        images="cifar",
        title="CIFAR-10, own split",
        first=CIFAR,
        again={**CIFAR, "epochs": 1, "learning_rate": 5e-4},
    ),
    Task(
        name="mnist",
        images="mnist",
        title="MNIST, 5,000",
        first=MNIST,
        again={**MNIST, "epochs": 1, "learning_rate": 2e-4},
    ),
    # the same pre-trained weights, routed in other ways from here on
    Task(
        name="mnist-expert-choice",
        images="mnist",
        title="MNIST, expert choice",
        first=MNIST,
        changes={"router_type": "expert_choice"},
    ),
    Task(
        name="mnist-e3",
        images="mnist",
        title="MNIST, E3 of 2 members",
        first=MNIST,
        changes={"ensemble_size": 2, "num_experts_per_tok": 1},
    ),
)


class Results:
    """Values computed once: one small JSON file each, and folders of models."""

    def __init__(self, work: Path, images: Path) -> None:
        self.work, self.images = work, images

    def test(self, task: Task) -> Path:
        return self.images / f"{task.images}_test.npz"

    def train(self, task: Task) -> Path:
        return self.images / f"{task.images}_train.npz"

    def accuracy(self, model: Path, test: Path) -> dict[str, Any]:
        """What `secateur eval` says of a model folder, from beside it."""
        record = model.parent / f"{model.name}.{test.stem}.json"
        if not record.exists():
            (found,) = evaluate_images([model], read_images(test))
            names = ("accuracy", "cross_entropy", "parameters", "flops_per_image", "pairs_per_image")
            atomic_write(record, json.dumps({name: found[name] for name in names}))
        kept: dict[str, Any] = json.loads(record.read_text())
        return kept

    def pretrained(self, seed: int) -> Path:
        start, out = self.work / f"seed{seed}" / "start", self.work / f"seed{seed}" / "pretrained"
        if not (start / "preprocessor_config.json").exists():
            torch.manual_seed(seed)
            config = VMoEConfig(**MODEL)
            VMoEForImageClassification(config).save_pretrained(start)
            atomic_write(start / "preprocessor_config.json", json.dumps(default_pixels(config)))
        self.tuned(start, out, self.images / "fashion_train.npz", PRETRAINING, seed)
        return out

    def tuned(self, model: Path, out: Path, data: Path, options: dict[str, Any], seed: int, **more: Any) -> None:
        if not out.is_dir():
            print(out.relative_to(self.work), flush=True)
            run_finetuning(model, out, FinetuneOptions(data=(str(data),), seed=seed, **options, **more), restart=True)

    def base(self, task: Task, seed: int) -> Path:
        """The pre-trained model with the task's changes of its config; its tensors are the same."""
        pretrained = self.pretrained(seed)
        if task.changes is None:
            return pretrained
        out = self.work / f"seed{seed}" / task.name / "pretrained"
        if not (out / CONFIG).exists():
            shutil.copytree(pretrained, out, ignore=shutil.ignore_patterns(CONFIG), dirs_exist_ok=True)
            config = json.loads((pretrained / CONFIG).read_text())
            atomic_write(out / CONFIG, json.dumps(config | task.changes))
        return out

    def finetuned(self, task: Task, seed: int) -> Path:
        out = self.work / f"seed{seed}" / task.name / "finetuned"
        options = NEVER_SAVED | task.first
        self.tuned(self.base(task, seed), out, self.train(task), options, seed, new_head=True)
        return out

    def pruned(self, task: Task, seed: int, criterion: str, keep: int, removed: str) -> Path:
        model = self.finetuned(task, seed)
        out = model.parent / f"{criterion}-{keep}-{removed}"
        if not out.is_dir():
            choice = Choice(criterion=criterion, keep=Keep(count=keep), seed=seed, removed=removed)
            if choice.needs_data:
                source = of_observation(self.observed(task, seed), read_model_folder(model), str(model))
            else:
                source = of_folder(model, self.base(task, seed) if criterion == "router_norm_change" else None)
            apply_to_model(model, decide_plan(source, choice), out)
        return out

    def observed(self, task: Task, seed: int) -> Observation:
        """The fine-tuned model on the images it was fine-tuned on."""
        model = self.finetuned(task, seed)
        path = model.parent / "observed.safetensors"
        if not path.exists():
            ImageObservation(read_model_folder(model), draw([str(self.train(task))], None, seed), path).observe()
        return Observation.load(path)

    def tuned_again(self, task: Task, seed: int, criterion: str, keep: int) -> Path:
        assert task.again is not None
        model = self.finetuned(task, seed) if keep == EXPERTS else self.pruned(task, seed, criterion, keep, "reroute")
        out = model.parent / f"{model.name}-again"
        self.tuned(model, out, self.train(task), NEVER_SAVED | task.again, seed)
        return out


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.work, arguments.images)
    seeds = range(arguments.seeds)
    fashion = arguments.images / "fashion_test.npz"
    before = [results.accuracy(results.pretrained(seed), fashion)["accuracy"] for seed in seeds]
    runs = [one for seed in seeds for task in TASKS for one in of_seed(results, task, seed)]
    times = timed(results, TASKS[0])
    rows = [row(runs, times, task, criterion, keep) for task in TASKS for criterion, keep in WAYS]
    columns = ["task, criterion", "experts", "next experts", "zero slot", "tuned again", "parameters"]
    columns += ["MFLOP an image, next; zero", "ms an image, next; zero"]
    show(f"top-1 accuracy in %, {arguments.seeds} seeds, mean ± standard deviation", columns, rows)
    record = {
        "seeds": arguments.seeds,
        "sources": json.loads((arguments.images / "sources.json").read_text()),
        "model": MODEL,
        "pretraining": PRETRAINING,
        "tasks": {task.name: {"first": task.first, "again": task.again, "changes": task.changes} for task in TASKS},
        "pretrained_accuracy_fashion": before,
        "runs": runs,
        "milliseconds_an_image": times,
    }
    print(f"Fashion-MNIST after pre-training: {spread(before)}")
    print(store("router_change_vision", record | {"table": [columns, *rows]}, stored=arguments.store))
    figure(runs, docs_in(arguments.store, "images"))


def of_seed(results: Results, task: Task, seed: int) -> list[dict[str, Any]]:
    """The results of one task and seed; `means` is "whole", "reroute", "zero-slot", or "again" for tuned once more."""
    test = results.test(task)
    found = []
    for criterion, keep in WAYS:
        models = {"whole": results.finetuned(task, seed)}
        if keep < EXPERTS:
            models = {removed: results.pruned(task, seed, criterion, keep, removed) for removed in REMOVED}
        if task.again is not None:
            models["again"] = results.tuned_again(task, seed, criterion, keep)
        one = {"task": task.name, "seed": seed, "criterion": criterion, "keep": keep}
        found += [{**one, "means": means, **results.accuracy(model, test)} for means, model in models.items()]
    return found


def timed(results: Results, task: Task) -> dict[str, float]:
    """{"KEEP means": process milliseconds an image}: medians over rounds in which every model has its turn."""
    record = results.work / "times.json"
    if not record.exists():
        folders = {f"{EXPERTS} whole": results.finetuned(task, 0)}
        for keep in KEEPS:
            folders |= {f"{keep} {one}": results.pruned(task, 0, "router_norm_change", keep, one) for one in REMOVED}
        images = read_images(results.test(task)).draw(TIMED, seed=0)
        batches = list(batches_for(read_model_folder(folders[f"{EXPERTS} whole"]), images, None))
        models = {name: loaded(read_model_folder(folder), "cpu") for name, folder in folders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        with torch.no_grad():
            for _ in range(ROUNDS + 1):
                for name, model in models.items():
                    begin = time.process_time()
                    for pixel_values, _labels in batches:
                        model(pixel_values=pixel_values)
                    seconds[name].append(time.process_time() - begin)
        medians = {name: 1000 * statistics.median(found[1:]) / TIMED for name, found in seconds.items()}
        atomic_write(record, json.dumps(medians))
    kept: dict[str, float] = json.loads(record.read_text())
    return kept


def row(runs: Sequence[dict[str, Any]], times: dict[str, float], task: Task, criterion: str, keep: int) -> list[str]:
    mine = [one for one in runs if (one["task"], one["criterion"], one["keep"]) == (task.name, criterion, keep)]

    def values(means: str, name: str) -> list[float]:
        return [one[name] for one in mine if one["means"] == means]

    kinds = ["whole", "whole"] if criterion == "none" else list(REMOVED)
    title = "none pruned" if criterion == "none" else CRITERIA[criterion]
    flops = "; ".join(f"{statistics.mean(values(kind, 'flops_per_image')) / 1e6:.1f}" for kind in kinds)
    cells = [spread(values(kind, "accuracy")) for kind in kinds]
    cells.append("" if task.again is None else spread(values("again", "accuracy")))
    milliseconds = "; ".join(f"{times[f'{keep} {kind}']:.2f}" for kind in kinds)
    shown = milliseconds if criterion in ("none", "router_norm_change") and task is TASKS[0] else ""
    parameters = f"{values(kinds[0], 'parameters')[0]:,}"
    return [f"{task.title}: {title}", f"{keep} of {EXPERTS}", *cells, parameters, flops, shown]


def spread(values: Sequence[float]) -> str:
    """In per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def figure(runs: Sequence[dict[str, Any]], images: Path) -> None:
    """Accuracy over the share of experts pruned, as in the paper's figures: rows are tasks, columns what was done."""
    panels = {
        "reroute": "to the next experts",
        "zero-slot": "zero slot, as the authors do",
        "again": "pruned, then tuned again",
    }
    tasks = [task for task in TASKS if task.again is not None]
    drawn, axes = plt.subplots(len(tasks), len(panels), figsize=(12, 6.4), sharey="row", layout="constrained")
    for task, of_task in zip(tasks, axes, strict=True):
        for (means, title), one in zip(panels.items(), of_task, strict=True):
            for criterion, name in CRITERIA.items():
                one.errorbar(*_curve(runs, task, criterion, means), marker="o", capsize=3, label=name)
            one.set_title(f"{task.title}: {title}", fontsize=9)
            one.set(xlabel="share of experts pruned")
        of_task[0].set(ylabel="top-1 accuracy, %")
    axes[0][0].legend(fontsize=8)
    drawn.savefig(images / "router-change-vision.png", dpi=120)


def _curve(
    runs: Sequence[dict[str, Any]], task: Task, criterion: str, means: str
) -> tuple[list[float], list[float], list[float]]:
    points = []
    for keep in (EXPERTS, *KEEPS):
        kind = ("again" if means == "again" else "whole") if keep == EXPERTS else means
        name = "none" if keep == EXPERTS else criterion
        asked = (task.name, name, keep, kind)
        mine = [one for one in runs if (one["task"], one["criterion"], one["keep"], one["means"]) == asked]
        values = [100 * one["accuracy"] for one in mine]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((1 - keep / EXPERTS, statistics.mean(values), deviation))
    shares, means_of, deviations = (list(column) for column in zip(*points, strict=True))
    return shares, means_of, deviations


if __name__ == "__main__":
    main()
