"""The rows of the evidence for LAEP: what one setting came to over its seeds, as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from laep_grid import SCALES, grid
from laep_statistics import Paired, paired

COLUMNS = (
    "run",
    "seeds",
    "pruned at step",
    "parameters left",
    "validation loss",
    "minus base, same seed",
    "95 % range",
    "p",
    "tokens/s",
)


class Evidence:
    """All runs of one scale, by name."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self.stored = stored
        self.settings = {one.name: one for one in grid(SCALES[stored["scale"]])}
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in stored["runs"]:
            self.runs.setdefault(run["name"], []).append(run)

    def finished(self, name: str) -> dict[int, dict[str, Any]]:
        """{seed: run}"""
        return {run["seed"]: run for run in self.runs.get(name, ()) if run["status"] == "finished"}

    def group(self, *groups: str) -> list[str]:
        return [one.name for one in self.settings.values() if one.group in groups and one.name in self.runs]

    def base_of(self, name: str) -> str:
        return self.settings[name].base

    def differences(self, name: str) -> dict[int, float]:
        """{seed: validation loss minus that of the base}, of seeds that both finished."""
        mine, base = self.finished(name), self.finished(self.base_of(name))
        return {
            seed: mine[seed]["validation_loss"] - base[seed]["validation_loss"]
            for seed in sorted(mine.keys() & base.keys())
        }

    def against_base(self, name: str, base: str | None = None) -> Paired | None:
        """The validation loss minus that of the base with the same seed; None without a seed that both finished."""
        mine, other = self.finished(name), self.finished(base or self.base_of(name))
        seeds = sorted(mine.keys() & other.keys())
        if not seeds:
            return None
        return paired(*([runs[seed]["validation_loss"] for seed in seeds] for runs in (mine, other)))

    def row(self, name: str) -> list[str]:
        """The cells of COLUMNS; a run that failed says so in the second."""
        runs, all_runs = self.finished(name), self.runs[name]
        failed = [run["status"] for run in all_runs if run["status"] != "finished"]
        seeds = f"{len(runs)}" + (f", {len(failed)} not: {failed[0]}" if failed else "")
        if not runs:
            return [name, seeds, *["-"] * (len(COLUMNS) - 2)]
        left = statistics.fmean(run["parameters"] / run["parameters_before"] for run in runs.values())
        found = self.against_base(name) if name != self.base_of(name) else None
        return [
            name,
            seeds,
            self.steps(name),
            f"{left:.1%}",
            spread([run["validation_loss"] for run in runs.values()]),
            *tested(found),
            self.speed(name),
        ]

    def steps(self, name: str) -> str:
        """Of the prunings of every seed; a run that should have pruned and did not says so."""
        if "--no-prune" in self.settings[name].options:
            return ""
        runs = self.finished(name).values()
        return "; ".join("+".join(str(event["step"]) for event in run["events"]) or "never" for run in runs)

    def speed(self, name: str) -> str:
        """Tokens/s of the model at the end, and over those of the whole one without balancing; see laep_timing.py."""
        times = self.stored["step_times"].get(name)
        if times is None:
            return ""
        whole, *pruned = times["seconds"]
        ratio = f" ({whole / pruned[-1]:.2f}x)" if pruned else ""
        return f"{times['tokens_a_step'] / times['seconds'][-1]:,.0f}{ratio}"

    def table(self, names: Iterable[str]) -> str:
        return markdown(COLUMNS, [self.row(name) for name in names])


def tested(found: Paired | None) -> list[str]:
    """The cells "minus base", "95 % range" and "p"."""
    if found is None:
        return ["", "", ""]
    return [
        spread([found.mean], found.deviation, sign="+"),
        "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}",
        "" if found.p is None else f"{found.p:.3f}" if found.p >= 0.001 else "<0.001",
    ]


def spread(values: Sequence[float], deviation: float | None = None, sign: str = "") -> str:
    """Mean ± standard deviation, of the values if it is not given; without it for one value."""
    if len(values) > 1:
        deviation = statistics.stdev(values)
    return f"{statistics.fmean(values):{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
