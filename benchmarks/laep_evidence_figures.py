"""The figures of the evidence for LAEP."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from laep_scale import EXPERTS, RETAINED

if TYPE_CHECKING:
    from laep_evidence import Evidence

KINDS = {"global": "o", "uniform": "s", "random experts": "x"}


def draw(evidence: Evidence, why: dict[str, Any], folder: Path) -> None:
    """Write every figure into `folder`."""
    plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 9})
    for name, make in FIGURES.items():
        found = make(evidence, why)
        found.savefig(folder / f"{name}.png")
        plt.close(found)


def loss_at(run: dict[str, Any], step: float) -> float:
    """The validation loss of a run at a step, on straight lines between its evaluations."""
    steps, _, values = zip(*run["evaluations"], strict=True)
    return float(np.interp(step, steps, values))


def scaling_points(evidence: Evidence) -> list[tuple[float, float, float]]:
    """(log10 of the base's parameters, log2 of its experts, loss minus the base's) of every pruned run."""
    points = []
    for name in evidence.group("scaling"):
        base = evidence.finished(evidence.base_of(name))
        for seed, run in evidence.finished(name).items() if name != evidence.base_of(name) else ():
            if seed in base:
                difference = run["validation_loss"] - base[seed]["validation_loss"]
                experts = run["model"]["num_experts"]
                points.append((math.log10(run["parameters_before"]), math.log2(experts), difference))
    return points


def balance(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(9, 3.6))
    names = evidence.group("table 1")[:-1]
    for place, name in enumerate(names):
        values = [run["validation_loss"] for run in evidence.finished(name).values()]
        axis.plot([place] * len(values), values, "o", color="tab:blue" if "LAEP" in name else "tab:grey")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set(ylabel="validation loss, each seed")
    return figure


def when(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(9, 3.6))
    base = evidence.finished("when: base")
    for name in evidence.group("when"):
        runs = {seed: run for seed, run in evidence.finished(name).items() if seed in base}
        if name == "when: base" or not runs:
            continue
        steps = [step for step, _, _ in next(iter(runs.values()))["evaluations"]]
        gaps = [
            statistics.fmean(loss_at(run, step) - loss_at(base[seed], step) for seed, run in runs.items())
            for step in steps
        ]
        axis.plot(steps, gaps, label=name.removeprefix("when: "))
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="step", ylabel="loss minus base, mean of the seeds")
    axis.legend(fontsize=7)
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
        means, spreads = [one.mean for _, one in found], [one.deviation for _, one in found]
        axis.errorbar(left, means, spreads, marker=marker, capsize=3, label=kind)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="share of the parameters left", ylabel="loss minus base")
    axis.legend()
    return figure


def scaling(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.6))
    points = scaling_points(evidence)
    for experts in sorted({point[1] for point in points}):
        mine = [point for point in points if point[1] == experts]
        axis.plot(
            [10 ** point[0] for point in mine], [point[2] for point in mine], "o", label=f"{2**experts:.0f} experts"
        )
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="parameters of the base", ylabel="loss minus base")
    axis.legend()
    return figure


def reasons(evidence: Evidence, why: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    windows = why["runs"][0]["windows"]
    layers = list(windows[0]["loads"])
    steps = [window["step"] for window in windows]
    for layer in layers:
        colour = plt.get_cmap("viridis")(int(layer) / max(1, len(layers) - 1))
        peaks = [max(window["loads"][layer]) / statistics.fmean(window["loads"][layer]) for window in windows]
        ranks = [window["rank_correlation"].get(layer, math.nan) for window in windows]
        for axis, values in zip(axes, (peaks, ranks, [window["entropy"][layer] for window in windows]), strict=True):
            axis.plot(steps, values, color=colour, linewidth=0.9, label=f"layer {layer}")
    titles = ("busiest expert over mean", "rank correlation with the window before", "entropy of the router (1: even)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="step", title=title)
    axes[1].set(ylim=(0, 1.02))
    axes[0].legend(fontsize=5, ncols=2)
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
    "when": when,
    "automatic": automatic,
    "scaling": scaling,
    "why": reasons,
    "profile": profile,
}
