"""The theory of pruning by router change (arXiv 2405.16646), put to the test on its own data model.

    python benchmarks/router_change_theory.py

Four starting points (V0 to V3, see synthetic_experts.py), many seeds, expert choice and token choice. Then two claims
that go further: how the change of irrelevant experts falls with the number of patterns d (the theorem: like
1 / sqrt(d)), in several settings, with the slope fitted to log-log medians and its 95 % range over resampled seeds; and
whether fine-tuning brings accuracy back when more than the irrelevant experts are pruned. Its
result is router_change_theory.json and images/router-change-theory.png.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import synthetic_experts as toy
from record import docs_in, parser_for, show, store

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE = 256  # the slope is fitted once more from this width on, where it is no longer bent by small widths
# what is changed -> the settings, by d
SCALING = {
    "as V0": lambda d: toy.Setting(d=d),
    "as V0, token choice": lambda d: toy.Setting(d=d, routing="token"),
    "irrelevant experts avoid o_1 and o_2 (V2)": lambda d: toy.Setting(d=d, avoid=1.0),
    "noise at the start of 0.16 / sqrt(d)": lambda d: toy.Setting(d=d, noise=0.16 / math.sqrt(d)),
    "4 times the steps": lambda d: toy.Setting(d=d, steps=1200),
    "steps of 300 * sqrt(d / 64)": lambda d: toy.Setting(d=d, steps=round(300 * math.sqrt(d / 64))),
    "irrelevant experts start without a pattern": lambda d: toy.Setting(d=d, irrelevant_size=0.0),
}
# an expert of several -> one number of a run
QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda change: change.abs().mean(dim=1),
    "largest": lambda change: change.abs().amax(dim=1),
}
KEEPS = (8, 6, 4, 3, 2, 1)
BEYOND = ("V0", "V3")  # the second has an expert to un-learn
FOUND = "runs that find the relevant experts"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--seeds", type=int, default=60, help="of each variant")
    parser.add_argument("--scaling-seeds", type=int, default=20, help="of each number of patterns")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"seeds": arguments.seeds, "scaling_seeds": arguments.scaling_seeds}
    record["variants"] = {
        f"{name}, {routing} choice": variant(replace(setting, routing=routing), arguments.seeds)
        for routing in toy.GATES
        for name, setting in toy.VARIANTS.items()
    }
    record["scaling"] = {
        name: scaling([make(d) for d in WIDTHS], arguments.scaling_seeds) for name, make in SCALING.items()
    }
    record["beyond"] = {
        f"{name}, {routing} choice": beyond(replace(toy.VARIANTS[name], routing=routing), arguments.seeds)
        for name in BEYOND
        for routing in toy.GATES
    }
    tables = shown(record)
    for title, (columns, *rows) in tables.items():
        show(title, columns, rows)
    print(
        store(
            "router_change_theory",
            record | {"table": [row for table in tables.values() for row in table]},
            stored=arguments.store,
        )
    )
    draw(record, docs_in(arguments.store, "images"))


def variant(setting: toy.Setting, seeds: int) -> dict[str, Any]:
    begin = toy.start(setting, range(seeds))
    end = toy.train(begin, torch.Generator().manual_seed(1))
    scores = end.scores(begin)
    change = scores["signed change"]
    relevant = torch.zeros(toy.EXPERTS, dtype=torch.bool)
    relevant[list(toy.RELEVANT)] = True
    results = {
        which: toy.on_new_samples(end, torch.Generator().manual_seed(2), kept)
        for which, kept in (
            ("none removed", None),
            ("4 lowest removed", toy.kept_by(change, 4)),
            ("4 highest removed", toy.kept_by(-change, 4)),
        )
    }
    return {
        "least change of a relevant expert": float(change[:, relevant].min()),
        "largest change of an irrelevant expert": float(change[:, ~relevant].max()),
        FOUND: {name: int(toy.finds_relevant(one).sum()) for name, one in scores.items()},
        "accuracy": {which: numbers(one["accuracy"]) for which, one in results.items()},
        "hinge": {which: numbers(one["hinge"]) for which, one in results.items()},
        "runs": seeds,
    }


def numbers(values: Tensor) -> dict[str, float]:
    return {"least": float(values.min()), "mean": float(values.mean()), "most": float(values.max())}


def shown(record: dict[str, Any]) -> dict[str, list[list[str]]]:
    """The tables by their titles, each with its head."""
    variants = [
        [
            "variant",
            "least change, relevant",
            "largest change, irrelevant",
            *(f"found by {score}" for score in next(iter(record["variants"].values()))[FOUND]),
            "accuracy, all kept",
            "4 lowest removed",
            "4 highest removed",
        ]
    ]
    for name, one in record["variants"].items():
        accuracy = one["accuracy"]
        worst = [f"{accuracy[which]['mean']:.3f} ({accuracy[which]['least']:.3f})" for which in accuracy]
        change = [
            f"{one['least change of a relevant expert']:+.4f}",
            f"{one['largest change of an irrelevant expert']:+.4f}",
        ]
        variants.append([name, *change, *(f"{count} of {one['runs']}" for count in one[FOUND].values()), *worst])
    slopes = [["setting", *(f"{name}, {part}" for name in QUANTITIES for part in ("all d", f"d from {LARGE} on"))]]
    for name, found in record["scaling"].items():
        slopes.append([name, *(interval(found[one][part]) for one in QUANTITIES for part in ("all", "large"))])
    beyond_rows = [["variant", *(f"{keep} of {toy.EXPERTS} kept" for keep in KEEPS)]]
    for name, found in record["beyond"].items():
        for when in ("before", "after"):
            cells = [f"{found[str(keep)][when]:.3f} ({found[str(keep)][f'worst_{when}']:.3f})" for keep in KEEPS]
            beyond_rows.append([f"{name}, {when} fine-tuning", *cells])
    return {
        "which experts are found, and accuracy: mean (worst run)": variants,
        "slope of log |change| of the irrelevant experts over log d (95 % range)": slopes,
        "accuracy with fewer experts: mean (worst run)": beyond_rows,
    }


def scaling(settings: list[toy.Setting], seeds: int) -> dict[str, Any]:
    """|change| of the irrelevant experts by seed and d, and the slope of its median over d."""
    irrelevant = [expert for expert in range(toy.EXPERTS) if expert not in toy.RELEVANT]
    changes = []
    for setting in settings:
        begin = toy.start(setting, range(seeds))
        end = toy.train(begin, torch.Generator().manual_seed(1))
        changes.append(end.scores(begin)["signed change"][:, irrelevant])
    widths = torch.tensor([float(setting.d) for setting in settings])
    found = {}
    for name, quantity in QUANTITIES.items():
        values = torch.stack([quantity(one) for one in changes])  # (widths, seeds)
        found[name] = {
            "d": widths.tolist(),
            "medians": values.median(dim=1).values.tolist(),
            "all": fitted(widths, values),
            "large": fitted(widths[widths >= LARGE], values[widths >= LARGE]),
        }
    return found


def fitted(widths: Tensor, values: Tensor) -> dict[str, float]:
    """The slope, and its 95 % range over resampled seeds."""
    draws = torch.Generator().manual_seed(0)
    seeds = values.shape[1]
    slopes = torch.tensor(
        [slope(widths, values[:, torch.randint(seeds, (seeds,), generator=draws)]) for _ in range(2000)]
    )
    low, high = slopes.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"slope": slope(widths, values), "low": low, "high": high}


def slope(widths: Tensor, values: Tensor) -> float:
    x, y = widths.log(), values.median(dim=1).values.log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def interval(found: dict[str, float]) -> str:
    return f"{found['slope']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def beyond(setting: toy.Setting, seeds: int) -> dict[str, dict[str, float]]:
    """Accuracy with fewer and fewer experts, before and after fine-tuning for as many steps as training took."""
    begin = toy.start(setting, range(seeds))
    end = toy.train(begin, torch.Generator().manual_seed(1))
    change = end.scores(begin)["signed change"]
    found = {}
    for keep in KEEPS:
        kept = toy.kept_by(change, keep)
        tuned = toy.train(end, torch.Generator().manual_seed(3), kept=kept)
        before, after = (
            toy.on_new_samples(one, torch.Generator().manual_seed(2), kept)["accuracy"] for one in (end, tuned)
        )
        found[str(keep)] = {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "worst_before": float(before.min()),
            "worst_after": float(after.min()),
        }
    return found


def draw(record: dict[str, Any], images: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, found in record["scaling"].items():
        one = found["mean"]
        left.loglog(one["d"], one["medians"], marker="o", label=f"{name}: {one['large']['slope']:+.2f}")
    top = max(max(found["mean"]["medians"]) for found in record["scaling"].values())
    left.loglog(WIDTHS, [top * math.sqrt(WIDTHS[0] / d) for d in WIDTHS], color="grey", label="1 / sqrt(d)")
    left.set(xlabel="patterns d", ylabel=f"mean |change| of irrelevant experts (slope: d >= {LARGE})")
    left.legend(fontsize=7)
    for number, name in enumerate(BEYOND):
        for routing in toy.GATES:
            found = record["beyond"][f"{name}, {routing} choice"]
            removed = [1 - int(keep) / toy.EXPERTS for keep in found]
            colour = f"C{2 * number + (routing == 'token')}"
            for when, style in (("before", "--"), ("after", "-")):
                label = f"{name}, {routing} choice, {when} fine-tuning"
                right.plot(removed, [one[when] for one in found.values()], style, color=colour, marker="o", label=label)
    right.axvline(0.5, color="grey", linewidth=0.8)
    right.set(xlabel="share of experts pruned (line: the irrelevant ones)", ylabel="mean accuracy")
    right.legend(fontsize=7)
    figure.savefig(images / "router-change-theory.png", dpi=130)


if __name__ == "__main__":
    main()
