"""Tables and figures in evidence/SCALE, from the results laep_tables_SCALE.json and laep_why.json.

    python benchmarks/laep_evidence.py

Every run that was made is in the tables. What is to be learnt from them, docs/evidence/README.md says in words.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import laep_evidence_figures as figures
from laep_grid import ATTENTION, SCALES, SMALL, TARGETS
from laep_rows import COLUMNS, Evidence, markdown, spread, tested
from laep_scale import EXPERTS, RETAINED
from laep_statistics import fitted, paired
from record import RESULTS, docs_in, parser_for, results_in

PUBLISHED_PARTS = (slice(0, 16), slice(16, 85), slice(85, None))  # pruned hard, less, hard


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    arguments = parser.parse_args()
    evidence, why = read(arguments.scale, results_in(arguments.store))
    folder = docs_in(arguments.store, f"evidence/{arguments.scale}")
    (folder / "tables.md").write_text(tables(evidence, why), encoding="utf-8")
    figures.draw(evidence, why, folder)
    print(folder)


def read(scale: str, results: Path = RESULTS) -> tuple[Evidence, dict[str, Any]]:
    """What was stored: all runs, and the runs that say why."""
    stored, why = (json.loads((results / f"{name}.json").read_text()) for name in (f"laep_tables_{scale}", "laep_why"))
    return Evidence(stored), why


def tables(evidence: Evidence, why: dict[str, Any]) -> str:
    """The text of tables.md."""
    parts = [about(evidence), *(section(evidence) for section in SECTIONS), reasons(why), losses(evidence)]
    return "\n\n".join(parts) + "\n"


def about(evidence: Evidence) -> str:
    stored, scale = evidence.stored, SCALES[evidence.stored["scale"]]
    runs = stored["runs"]
    tokens = sorted({run["tokens"] for run in runs if "tokens" in run})
    seeds = sorted({run["seed"] for run in runs})
    failed = sum(run["status"] != "finished" for run in runs)
    return f"""# All runs behind the evidence for LAEP

{len(runs)} training runs, {failed} of which failed or could not be made; every one is a row. What is to be learnt from
them is in [the evidence](../README.md) and [where it does not help](../where-it-does-not-help.md).

Seeds {seeds}. Tokens a run: {", ".join(f"{number:,}" for number in tokens)}. Model: {json.dumps(scale.model)},
unless a row says otherwise: 16 experts in each of its MoE layers, top-2. Text: code, manuals, dictionary, speeches.
Where a detector decides, it is looser than `pretrain`'s default, which waits until about half of so short a run
(`benchmarks/laep_grid.py` has all settings).

```
python benchmarks/fetch_text.py TEXT
python benchmarks/laep_tables.py TEXT --work WORK --scale {stored["scale"]}
python benchmarks/laep_timing.py --work WORK --scale {stored["scale"]}
python benchmarks/laep_tables.py TEXT --work WORK --scale {stored["scale"]} --gather
python benchmarks/laep_why.py TEXT --work WORK
python benchmarks/laep_evidence.py --scale {stored["scale"]}
```
Runs by versions and hardware: {"; ".join(made_on(runs))}.

Losses are nats a token on held-out text, which differs from seed to seed, so their spread is not that of a difference.
"Minus base" compares runs of the same seed: same weights at the start, same tokens in the same order; the range and p
are of a paired t-test, which with three pairs tells only large effects from chance, and no correction is made for the
number of rows. Rows whose losses are equal in every digit pruned the same experts. tokens/s are of a step with the
final model, process time of one thread, counts of seed 0 and fresh weights; in brackets over those of the whole model
without balancing, measured in turn with it. The machine's speed drifts between rows: only the brackets compare."""


def made_on(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One text for each set of versions and hardware, with the number of its runs."""
    kinds = Counter(
        ", ".join(f"{name} {value}" for name, value in (run["versions"] | run["hardware"]).items() if value is not None)
        for run in runs
        if "versions" in run
    )
    return [f"{number} runs with {kind}" for kind, number in kinds.most_common()]


def table_1(evidence: Evidence) -> str:
    names = evidence.group("table 1")
    latent = [name for name in ("base, latent", "bias, latent") if name in evidence.runs]
    return f"""## Balancing or pruning

Auxiliary losses and LAEP with beta alone, as in the paper's main table. The row with another learning rate is what a
change without a meaning does. Selection biases need a router that has them, so that row is of the model with latent
attention and compares with its own base.

{evidence.table([*(name for name in names if name not in latent), *latent])}

![loss minus base of every seed](balance.png)"""


def table_2(evidence: Evidence) -> str:
    parts = [
        """## Individual threshold, by kind of attention

The three are of three families, which differ in more than attention (the one with latent attention has sigmoid routing,
a shared expert and a dense first layer): each compares with its own base, and not with the others."""
    ]
    for attention in ATTENTION.values():
        names = [f"base, {attention}", *(name for name in evidence.group("table 2") if name.endswith(attention))]
        shown = [name for name in dict.fromkeys(names) if name in evidence.runs]
        parts.append(f"### {attention}\n\n{evidence.table(shown)}")
    pairs = [
        difference > 0
        for name in evidence.group("table 2")
        if name != evidence.base_of(name)
        for difference in evidence.differences(name).values()
    ]
    parts.append(f"{sum(pairs)} of the {len(pairs)} runs ended above the base of their seed.")
    parts.append("![loss minus base of every seed](attention.png)")
    return "\n\n".join(parts)


def when(evidence: Evidence) -> str:
    names = evidence.group("when")
    bases = bases_of_all_lengths(evidence)
    rows = [[name, *at_equal_time(evidence, name)] for name in names if name not in bases]
    columns = ("run", "steps of the base in the same time", "its loss then", "minus base at equal time")
    return f"""## When to prune

A quarter of the parameters goes, once or in parts, at the detector's step or before or after it.

{evidence.table(names)}

At equal time: the base with as many steps as it makes while the pruned run makes all of its own, by the measured times
of a step; its loss lies between those of the bases above, which all ended with a schedule of their own.

{markdown(columns, rows)}

![validation loss over steps](when.png)"""


def bases_of_all_lengths(evidence: Evidence) -> dict[str, int]:
    """{name: steps} of the bases of different lengths, the longest included."""
    return {
        name: evidence.settings[name].steps
        for name in evidence.group("when")
        if name.startswith(evidence.base_of(name))
    }


def at_equal_time(evidence: Evidence, name: str) -> list[str]:
    """The cells after the name; "-" where no base was as long or as short."""
    runs, times = evidence.finished(name), evidence.stored["step_times"].get(name)
    lengths = sorted((steps, base) for base, steps in bases_of_all_lengths(evidence).items())
    bases = {steps: evidence.finished(base) for steps, base in lengths}
    seeds = [seed for seed, run in runs.items() if run["events"] and all(seed in found for found in bases.values())]
    if times is None or not seeds:
        return ["-", "-", "-"]
    steps = {seed: equal_steps(runs[seed], times["seconds"]) for seed in seeds}
    shown = "; ".join(f"{number:,.0f}" for number in steps.values())
    if min(steps.values()) < min(bases) or max(steps.values()) > max(bases):
        return [shown, "-", "-"]
    reached = [
        float(np.interp(steps[seed], list(bases), [found[seed]["validation_loss"] for found in bases.values()]))
        for seed in seeds
    ]
    found = paired([runs[seed]["validation_loss"] for seed in seeds], reached)
    return [shown, spread(reached), spread([found.mean], found.deviation, sign="+")]


def equal_steps(run: dict[str, Any], seconds: Sequence[float]) -> float:
    """The steps of the whole model in the time of a run whose steps take `seconds`, [whole, after pruning 1, ...]."""
    ends = [*(event["step"] for event in run["events"]), run["steps"]]
    parts = zip([0, *ends], ends, seconds, strict=False)
    return sum((end - begin) * one for begin, end, one in parts) / seconds[0]


def automatic(evidence: Evidence) -> str:
    names = evidence.group("automatic")
    rows = [
        [f"target {target}, {other} minus global", *tested(evidence.against_base(*pair))]
        for target in TARGETS
        for other in ("uniform", "random experts")
        if set(pair := (f"target {target}, {other}", f"target {target}, global")) <= evidence.runs.keys()
    ]
    return f"""## Goals: global, uniform, random

`--target-params` over all layers at once, with one count for all layers, and with the same counts as the first but
drawn experts: the control that must lose if loads tell anything. One count for all layers cannot meet every target; the
share that is left says what it met. The last row is a model that had as few experts from the start.

{evidence.table(names)}

The same runs against each other:

{markdown(("difference, same seed", "mean", *COLUMNS[6:8]), rows)}

![loss over base by what is left](automatic.png)"""


def scaling(evidence: Evidence) -> str:
    points = figures.scaling_points(evidence)
    lines = []
    if len(points) > 3:
        widths, experts, differences = (
            [point[name] for point in points] for name in ("width", "experts", "difference")
        )
        mean = paired(differences, [0.0] * len(differences))
        lines.append(f"* mean of the sizes: {mean.mean:+.4f} nats (95 % range {mean.low:+.4f} to {mean.high:+.4f})")
        fit = fitted(differences, np.log2(widths).tolist(), np.log2(experts).tolist())
        for what, slope in zip(("twice the width", "twice the experts"), fit.slopes, strict=True):
            lines.append(f"* {what}: {slope.value:+.4f} nats (95 % range {slope.low:+.4f} to {slope.high:+.4f})")
    fits = "\n".join(lines)
    return f"""## Scaling

Widths and numbers of experts; a quarter of the parameters goes at a fixed step. For one width the active parameters are
the same but for the routers' rows, which every token meets (a tenth more with 128 experts than with 16). A quarter of
the parameters is a third of the experts where there are few of them, and a quarter where there are many.

{evidence.table(evidence.group("scaling"))}

Of the difference to the base, one point (mean of the seeds) for each size, the slopes fitted together:

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
            more = [run["loss_of_tokens"][after] for run in runs]
            found = [one[group]["pruned"] - one[group]["whole"] for one in more if group in one]
            cells.append(spread(found, sign="+") if found else "-")
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
    by_layer = [
        statistics.fmean(run["tokens_that_lost_by_layer"][str(layer)] for run in runs) for layer in range(depth)
    ]
    ends, middle = (profile[0] + profile[-1]) / 2, statistics.fmean(profile[1:-1])
    published = [statistics.fmean(RETAINED[part]) / EXPERTS for part in PUBLISHED_PARTS]
    settings = why["settings"]
    return f"""## Why

{len(runs)} seeds of a model with {depth} layers ({json.dumps(why["model"])}), pruned at step
{settings["prune_at"]} of {settings["steps"]} to {settings["target"]:.0%} of its parameters, against the same run left
whole. (The released model was pruned by thresholds, not to a share.)

Share of the experts kept, layer 0 first: {" ".join(f"{share:.2f}" for share in profile)}.
The first and the last layer keep {ends:.2f}, those between them {middle:.2f}. The released model keeps
{published[0]:.2f} of the experts in its first 16 layers, {published[1]:.2f} in the middle ones and
{published[2]:.2f} in the last 18.

{statistics.fmean(shares):.1%} of the validation tokens lost an expert in some layer. By layer:
{" ".join(f"{share:.1%}" for share in by_layer)}. By domain: {by_domain}.
By how common the token is, most common fifth first: {" ".join(f"{share:.1%}" for share in bins)}.

Loss of the pruned run minus that of the whole one, of what follows tokens that lost an expert and of what follows the
others, which may have tokens that lost one before them:

{markdown(("steps after the pruning", "tokens that lost an expert", "the others"), rows)}

![loads, ranks and router entropy of the first seed](why.png)

![experts kept by depth](profile.png)"""


def losses(evidence: Evidence) -> str:
    pruned: list[str] = []
    controls: list[str] = []
    for name in evidence.runs:
        if name == evidence.base_of(name):
            continue
        found = evidence.against_base(name)
        one = evidence.settings[name]
        if found is None or found.mean > 0 or len(evidence.finished(name)) < len(evidence.runs[name]):
            is_laep = "--no-prune" not in one.options and not one.random and name != SMALL
            (pruned if is_laep else controls).append(name)
    return f"""## Rows that ended above their base

Worst first, and those of which a run failed.

{evidence.table(worst_first(evidence, pruned))}

Controls, balance losses, and bases of other lengths:

{evidence.table(worst_first(evidence, controls))}"""


def worst_first(evidence: Evidence, names: Sequence[str]) -> list[str]:
    def excess(name: str) -> float:
        found = evidence.against_base(name)
        return math.inf if found is None else found.mean

    return sorted(names, key=excess, reverse=True)


if __name__ == "__main__":
    main()
