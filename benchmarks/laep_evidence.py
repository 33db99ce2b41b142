"""Tables and figures in docs/evidence, from results/laep_tables_SCALE.json and results/laep_why.json.

    python benchmarks/laep_evidence.py

Every run that was made is in the tables. What is to be learnt from them, docs/evidence/README.md says in words.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import laep_evidence_figures as figures
from laep_grid import ATTENTION, SCALES, grid
from laep_scale import EXPERTS, RETAINED
from laep_statistics import Paired, fitted_line, paired
from record import RESULTS

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
COLUMNS = ("run", "seeds", "parameters left", "validation loss", "minus base, same seed", "95 % range", "p", "tokens/s")
PUBLISHED_PARTS = (slice(0, 16), slice(16, 85), slice(85, None))  # pruned hard, less, hard


class Evidence:
    """All runs of one scale, by name."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self.stored = stored
        self.settings = grid(SCALES[stored["scale"]])
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in stored["runs"]:
            self.runs.setdefault(run["name"], []).append(run)

    def finished(self, name: str) -> dict[int, dict[str, Any]]:
        """{seed: run}"""
        return {run["seed"]: run for run in self.runs.get(name, ()) if run["status"] == "finished"}

    def group(self, *groups: str) -> list[str]:
        return [one.name for one in self.settings if one.group in groups and one.name in self.runs]

    def base_of(self, name: str) -> str:
        return next(one.base for one in self.settings if one.name == name)

    def against_base(self, name: str, base: str | None = None) -> Paired | None:
        """The validation loss minus that of the base with the same seed; None without a seed that both finished."""
        mine, other = self.finished(name), self.finished(base or self.base_of(name))
        seeds = sorted(mine.keys() & other.keys())
        if not seeds:
            return None
        return paired(*([runs[seed]["validation_loss"] for seed in seeds] for runs in (mine, other)))

    def row(self, name: str) -> list[str]:
        """The cells of COLUMNS; a run that failed says so in the second."""
        runs, all_runs = list(self.finished(name).values()), self.runs[name]
        failed = [run["status"] for run in all_runs if run["status"] != "finished"]
        seeds = f"{len(runs)}" + (f", {len(failed)} not: {failed[0]}" if failed else "")
        if not runs:
            return [name, seeds, *["-"] * (len(COLUMNS) - 2)]
        left = statistics.fmean(run["parameters"] / run["parameters_before"] for run in runs)
        found = self.against_base(name) if name != self.base_of(name) else None
        return [
            name,
            seeds,
            f"{left:.1%}",
            spread([run["validation_loss"] for run in runs]),
            "" if found is None else f"{found.mean:+.4f} ± {found.deviation:.4f}",
            "" if found is None or found.low is None else f"{found.low:+.4f} to {found.high:+.4f}",
            "" if found is None or found.p is None else f"{found.p:.3f}",
            self.speed(name),
        ]

    def speed(self, name: str) -> str:
        """Of a step after the pruning, over that of its base; see laep_timing.py."""
        times = self.stored["step_times"].get(name)
        return "" if times is None else f"{times['speed']:.2f}x"

    def table(self, names: Iterable[str]) -> str:
        return markdown(COLUMNS, [self.row(name) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    arguments = parser.parse_args()
    evidence, why = read(arguments.scale)
    DOCS.mkdir(exist_ok=True)
    for name, text in pages(evidence, why).items():
        (DOCS / name).write_text(text, encoding="utf-8")
    figures.draw(evidence, why, DOCS)
    print(DOCS)


def read(scale: str) -> tuple[Evidence, dict[str, Any]]:
    """What was stored: all runs, and the runs that say why."""
    stored, why = (json.loads((RESULTS / f"{name}.json").read_text()) for name in (f"laep_tables_{scale}", "laep_why"))
    return Evidence(stored), why


def pages(evidence: Evidence, why: dict[str, Any]) -> dict[str, str]:
    """{file name: text} in docs/evidence; its README.md is written by hand."""
    parts = [about(evidence), *(section(evidence) for section in SECTIONS), reasons(why)]
    return {"tables.md": "\n\n".join(parts) + "\n", "where-it-does-not-help.md": losses(evidence) + "\n"}


def about(evidence: Evidence) -> str:
    stored, scale = evidence.stored, SCALES[evidence.stored["scale"]]
    runs = stored["runs"]
    tokens = sorted({run["tokens"] for run in runs if "tokens" in run})
    seeds = sorted({run["seed"] for run in runs})
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    hardware = ", ".join(f"{name} {value}" for name, value in stored["hardware"].items() if value is not None)
    failed = sum(run["status"] != "finished" for run in runs)
    return f"""# All runs behind the evidence for LAEP

{len(runs)} training runs, {failed} of which failed or could not be made; every one is a row. Seeds {seeds}.
Tokens a run: {", ".join(f"{number:,}" for number in tokens)}.
Model: {json.dumps(scale.model)}, 4 layers, 16 experts, top-2, unless a row says otherwise.
Text: code, manuals, dictionary, speeches. Where a detector decides, it is looser than `pretrain`'s default, so that
it fires within so short a run (`benchmarks/laep_grid.py` has all settings).

```
python benchmarks/fetch_text.py TEXT
python benchmarks/laep_tables.py TEXT --work WORK
python benchmarks/laep_timing.py --work WORK && python benchmarks/laep_tables.py TEXT --work WORK --gather
python benchmarks/laep_why.py TEXT --work WORK
python benchmarks/laep_evidence.py
```
Versions: {versions}. Hardware: {hardware}. All rows come from this machine.

Losses are nats a token on held-out text. "Minus base" compares runs of the same seed: same weights at the start, same
tokens in the same order; the range and p are of a paired t-test, which with three pairs tells only large effects from
chance, and no correction is made for the number of rows. "tokens/s" is the speed of a step with the pruned model over
one with the whole model, process time of one thread. Rows where pruning lost are collected in
[where it does not help](where-it-does-not-help.md)."""


def table_1(evidence: Evidence) -> str:
    latent = ["base, latent"] if "base, latent" in evidence.runs else []
    names = evidence.group("table 1")
    return f"""## Balancing or pruning

Auxiliary losses and LAEP with beta alone, as in the paper's main table. Selection biases need a router that has them,
so that row is of the model with latent attention and compares with its own base.

{evidence.table([*names[:-1], *latent, *names[-1:]])}

![validation loss of every seed](balance.png)"""


def table_2(evidence: Evidence) -> str:
    parts = ["## Individual threshold, by kind of attention"]
    for attention in ATTENTION.values():
        names = [f"base, {attention}", *(name for name in evidence.group("table 2") if name.endswith(attention))]
        shown = [name for name in dict.fromkeys(names) if name in evidence.runs]
        parts.append(f"### {attention}\n\n{evidence.table(shown)}")
    return "\n\n".join(parts)


def when(evidence: Evidence) -> str:
    names = evidence.group("when")
    rows = [[name, *at_equal_time(evidence, name)] for name in names if name != "when: base"]
    columns = ("run", "steps of the prunings", "base stopped at the same time", "minus base at equal time")
    return f"""## When to prune

A quarter of the parameters goes, once or in parts, at the detector's step or before or after it.

{evidence.table(names)}

At equal time: what the base had reached when the pruned run was through. The base's learning rate had not come down by
then, so this comparison favours the pruned run; where the pruned model is not faster, there is nothing to compare.

{markdown(columns, rows)}

![validation loss over steps](when.png)"""


def at_equal_time(evidence: Evidence, name: str) -> list[str]:
    runs, base = evidence.finished(name), evidence.finished("when: base")
    steps = "; ".join(" ".join(str(event["step"]) for event in run["events"]) or "none" for run in runs.values())
    times = evidence.stored["step_times"].get(name)
    seeds = sorted(runs.keys() & base.keys())
    if times is None or not seeds or times["speed"] <= 1 or not all(runs[seed]["events"] for seed in seeds):
        return [steps, "-", "-"]
    reached = [figures.loss_at(base[seed], equal_time(runs[seed], times["speed"])) for seed in seeds]
    found = paired([runs[seed]["validation_loss"] for seed in seeds], reached)
    return [steps, spread(reached), f"{found.mean:+.4f} ± {found.deviation:.4f}"]


def equal_time(run: dict[str, Any], speed: float) -> float:
    """The step the base has reached when the pruned run has made all of its own."""
    first = run["events"][0]["step"]
    return float(first + (run["steps"] - first) / speed)


def automatic(evidence: Evidence) -> str:
    names = evidence.group("automatic")
    return f"""## Goals: global, uniform, random

`--target-params` over all layers at once, with one count for all layers, and with the same counts as the first but
drawn experts: the control that must lose if loads tell anything.

{evidence.table(names)}

![loss over base by what is left](automatic.png)"""


def scaling(evidence: Evidence) -> str:
    names = evidence.group("scaling")
    points = figures.scaling_points(evidence)
    lines = []
    for what, which in (("log10 of the parameters", 0), ("log2 of the experts", 1)):
        if len({point[which] for point in points}) > 1 and len(points) > 2:
            line = fitted_line([point[which] for point in points], [point[2] for point in points])
            lines.append(
                f"* over {what}: {line.slope:+.4f} nats a unit (95 % range {line.low:+.4f} to {line.high:+.4f})"
            )
    fits = "\n".join(lines)
    return f"""## Scaling

Widths and expert counts at the same active parameters for a width; a quarter of the parameters goes at a fixed step.

{evidence.table(names)}

Lines through the difference to the base, one point a run and seed:

{fits}

![difference to the base by size](scaling.png)"""


SECTIONS: tuple[Callable[[Evidence], str], ...] = (table_1, table_2, when, automatic, scaling)


def reasons(why: dict[str, Any]) -> str:
    runs = why["runs"]
    depth = len(runs[0]["kept"])
    profile = [statistics.fmean(run["kept"][str(layer)] / run["experts"] for run in runs) for layer in range(depth)]
    offsets = list(runs[0]["loss_of_tokens"])
    rows = []
    for after in offsets:
        cells = [f"{after}"]
        for group in ("lost", "kept"):
            more = [run["loss_of_tokens"][after][group] for run in runs]
            cells.append(spread([one["pruned"] - one["whole"] for one in more], sign="+"))
        rows.append(cells)
    shares = [run["tokens_that_lost"] for run in runs]
    domains = runs[0]["who_lost"]["by_domain"]
    by_domain = ", ".join(
        f"{name} {statistics.fmean(run['who_lost']['by_domain'][name] for run in runs):.1%}" for name in domains
    )
    bins = [
        statistics.fmean(column)
        for column in zip(*(run["who_lost"]["by_frequency_common_first"] for run in runs), strict=True)
    ]
    ends, middle = (profile[0] + profile[-1]) / 2, statistics.fmean(profile[1:-1])
    published = [statistics.fmean(RETAINED[part]) / EXPERTS for part in PUBLISHED_PARTS]
    settings = why["settings"]
    return f"""## Why

{len(runs)} seeds of a model with {depth} layers ({json.dumps(why["model"])}), pruned at step
{settings["prune_at"]} of {settings["steps"]} to {settings["target"]:.0%} of its parameters, against the same run left
whole.

Share of the experts kept, layer 0 first: {" ".join(f"{share:.2f}" for share in profile)}.
The first and the last layer keep {ends:.2f}, those between them {middle:.2f}. The released model keeps
{published[0]:.2f} of the experts in its first 16 layers, {published[1]:.2f} in the middle ones and
{published[2]:.2f} in the last 18.

{statistics.fmean(shares):.1%} of the validation tokens lost an expert in some layer. By domain: {by_domain}.
By how common the next token is, most common fifth first: {" ".join(f"{share:.1%}" for share in bins)}.

Loss of the pruned run minus that of the whole one, on tokens that lost an expert and on the others:

{markdown(("steps after the pruning", "tokens that lost an expert", "the others"), rows)}

![loads, ranks and router entropy](why.png)

![experts kept by depth](profile.png)"""


def losses(evidence: Evidence) -> str:
    rows = []
    for name in evidence.runs:
        if name == evidence.base_of(name):
            continue
        found = evidence.against_base(name)
        if found is None or found.mean > 0:
            rows.append((float("inf") if found is None else found.mean, evidence.row(name)))
    rows.sort(key=lambda pair: -pair[0])
    pruned = [name for name in evidence.runs if name != evidence.base_of(name)]
    return f"""# Where it does not help

{len(rows)} of the {len(pruned)} settings that were compared with a base ended above it (or not at all). Worst first;
the rows are those of [all tables](tables.md).

{markdown(COLUMNS, [row for _, row in rows])}"""


def spread(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.4f} ± {deviation:.4f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
