"""The figures of the evidence for LAEP."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from laep_rows import Evidence
from laep_scale import EXPERTS, RETAINED
from laep_statistics import fitted

KINDS = {"global": "o", "uniform": "s", "random experts": "x"}


def draw(evidence: Evidence, why: dict[str, Any], folder: Path) -> None:
    """Write every figure into `folder`."""
    plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 9})
    for name, make in FIGURES.items():
        found = make(evidence, why)
        found.savefig(folder / f"{name}.png")
        plt.close(found)


def scaling_points(evidence: Evidence) -> list[dict[str, Any]]:
    """Of every size: its width, experts and parameters, and the loss minus the base's, of each seed and their mean."""
    points = []
    for name in evidence.group("scaling"):
        differences = [*evidence.differences(name).values()]
        if name == evidence.base_of(name) or not differences:
            continue
        run = next(iter(evidence.finished(name).values()))
        points.append(
            {
                "width": run["model"]["hidden_size"],
                "experts": run["model"]["num_experts"],
                "parameters": run["parameters_before"],
                "difference": statistics.fmean(differences),
                "differences": differences,
            }
        )
    return points


def balance(evidence: Evidence, why: dict[str, Any]) -> Any:
    return differences(evidence, evidence.group("table 1"))


def attention(evidence: Evidence, why: dict[str, Any]) -> Any:
    return differences(evidence, evidence.group("table 2"))


def differences(evidence: Evidence, names: Sequence[str]) -> Any:
    """Loss minus base of every seed, one colour a seed."""
    names = [name for name in names if name != evidence.base_of(name)]
    figure, axis = plt.subplots(figsize=(9, 4))
    found = [evidence.differences(name) for name in names]
    for seed in sorted({seed for one in found for seed in one}):
        dots = [(place, one[seed]) for place, one in enumerate(found) if seed in one]
        axis.plot(*zip(*dots, strict=True), "o", label=f"seed {seed}")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set(ylabel="loss minus base, same seed")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def when(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(9, 3.6))
    base = evidence.finished("when: base")
    for name in evidence.group("when"):
        seeds = sorted(evidence.finished(name).keys() & base.keys())
        if name.startswith("when: base") or not seeds:
            continue
        curves = [
            {step: loss for step, _, loss in runs[seed]["evaluations"]}
            for seed in seeds
            for runs in (evidence.finished(name), base)
        ]
        steps = sorted(set.intersection(*map(set, curves)))
        gaps = [
            statistics.fmean(curve[step] for curve in curves[::2])
            - statistics.fmean(curve[step] for curve in curves[1::2])
            for step in steps
        ]
        axis.plot(steps, gaps, marker=".", label=name.removeprefix("when: "))
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="step", ylabel="loss minus base, mean of the seeds")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def automatic(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for kind, marker in KINDS.items():
        names = [name for name in evidence.group("automatic") if name.endswith(kind)]
        found = [(name, difference) for name in names if (difference := evidence.against_base(name)) is not None]
        left = [
            statistics.fmean(run["parameters"] / run["parameters_before"] for run in evidence.finished(name).values())
            for name, _ in found
        ]
        means, spreads = [one.mean for _, one in found], [one.deviation or 0.0 for _, one in found]
        axis.errorbar(left, means, spreads, marker=marker, capsize=3, label=kind)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="share of the parameters left", ylabel="loss minus base")
    axis.legend()
    return figure


def scaling(evidence: Evidence, why: dict[str, Any]) -> Any:
    """Every seed, and a line through the means of the sizes with the range of the fitted mean."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    points = scaling_points(evidence)
    for experts in sorted({point["experts"] for point in points}):
        mine = [point for point in points if point["experts"] == experts]
        sizes = [point["parameters"] for point in mine for _ in point["differences"]]
        axis.plot(sizes, [one for point in mine for one in point["differences"]], "o", label=f"{experts} experts")
    if len(points) > 2:
        logs = [math.log10(point["parameters"]) for point in points]
        line = fitted([point["difference"] for point in points], logs)
        at = np.linspace(min(logs), max(logs), 50)
        middle, low, high = zip(*(line.at(x) for x in at), strict=True)
        axis.plot(10**at, middle, color="black", linewidth=1, label="line through the sizes, 95 % range")
        axis.fill_between(10**at, low, high, color="grey", alpha=0.25)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="parameters of the base", ylabel="loss minus base")
    figure.legend(loc="outside upper center", fontsize=7, ncols=4)
    return figure


def reasons(evidence: Evidence, why: dict[str, Any]) -> Any:
    """Of the first seed: the whole run above, the pruned one below."""
    run = why["runs"][0]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), sharex=True, sharey="col")
    titles = ("busiest expert over mean", "rank correlation with the window before", "entropy of the router (1: even)")
    for name, row in zip(("windows", "windows_pruned"), axes, strict=True):
        windows = run[name]
        steps = [window["step"] for window in windows]
        layers = list(windows[0]["busiest"])
        for layer in layers:
            colour = plt.get_cmap("viridis")(int(layer) / max(1, len(layers) - 1))
            peaks = [window["busiest"][layer] for window in windows]
            ranks = [window["rank_correlation"].get(layer, math.nan) for window in windows]
            for axis, values in zip(row, (peaks, ranks, [window["entropy"][layer] for window in windows]), strict=True):
                axis.plot(steps, values, color=colour, linewidth=0.9, label=f"layer {layer}")
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(f"{'whole' if name == 'windows' else 'pruned'}: {title}", fontsize=9)
    for axis in axes[1]:
        axis.set(xlabel="step")
    axes[0][1].set(ylim=(0, 1.02))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7, ncols=len(labels))
    return figure


def profile(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot(
        np.linspace(0, 1, len(RETAINED)),
        [count / EXPERTS for count in RETAINED],
        color="grey",
        label="released 1010B model",
    )
    for number, run in enumerate(why["runs"]):
        kept = [run["kept"][str(layer)] / run["experts"] for layer in range(len(run["kept"]))]
        axis.plot(np.linspace(0, 1, len(kept)), kept, marker="o", linewidth=0.9, label=f"seed {number}")
    axis.set(xlabel="depth (0: first layer)", ylabel="share of the experts kept", ylim=(0, 1.05))
    axis.legend(fontsize=7)
    return figure


FIGURES = {
    "balance": balance,
    "attention": attention,
    "when": when,
    "automatic": automatic,
    "scaling": scaling,
    "why": reasons,
    "profile": profile,
}
