"""Which figures a run gets, in which order, with the words around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from secateur.reporting import figures_kept, figures_loads, figures_phases, figures_run
from secateur.reporting.numbers import chosen_layers, dropped_share, placed, rule_in_words, stretches
from secateur.reporting.ranks import max_over_mean, rank_balance
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import Theme
from secateur.reporting.words import count, share
from secateur.surgery.events import PruneEvent


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One figure: file name without ending, heading, how to read it, what it shows in words, and how to draw it."""

    name: str
    heading: str
    caption: str
    alternative: str
    draw: Callable[[Theme], Figure]


def gallery(run: RunData) -> list[Entry]:
    """The figures of a run; those that need a pruning or loads are left out where there is none."""
    entries = [_loss(run), _load_over_time(run)]
    if figures_phases.has_phases(run):
        entries.append(_phases(run))
    entries += [_cut(event, number, len(run.prunings)) for number, event in enumerate(run.prunings, start=1)]
    if run.prunings:
        entries.append(_kept(run))
    entries.append(_cost(run))
    if rank_balance(run).ranks:
        entries.append(_ranks(run))
    return entries


def _loss(run: RunData) -> Entry:
    control = (
        " The control is the same run without pruning. The lower panel is the difference of their validation losses."
        if run.control
        else ""
    )
    return Entry(
        name="loss",
        heading="Loss",
        caption="Thin line: training loss of each logged step; thick line: its running mean over about a fortieth of "
        f"the run; dots: validation loss.{' Dashed: pruning.' if run.prunings else ''}{control}",
        alternative=f"{figures_run.loss_title(run)}. Training and validation loss against "
        f"{count(run.tokens)} tokens, with {len(run.prunings)} prunings marked.",
        draw=partial(figures_run.loss_figure, run),
    )


def _load_over_time(run: RunData) -> Entry:
    shown, layers = chosen_layers(list(run.model.experts)), list(run.model.experts)
    some = f" {len(shown)} of the {len(layers)} layers are shown." if len(shown) < len(layers) else ""
    return Entry(
        name="load_over_time",
        heading="Load of each expert over time",
        caption="One row an expert, numbered as at the start of the run; the colour is its load over the mean load of "
        "the experts that its layer has at that time. A row of one colour means a settled expert; hatched means "
        f"dropped.{some}",
        alternative=f"{figures_loads.load_over_time_title(run)}. Heat maps of {len(shown)} layers: "
        "tokens across, experts up, colour for the load.",
        draw=partial(figures_loads.load_over_time_figure, run),
    )


def _phases(run: RunData) -> Entry:
    parts = "; ".join(
        f"{phase} from {count(begin)} to {count(end)} tokens" for phase, begin, end in stretches(run.windows)
    )
    return Entry(
        name="phases",
        heading="When the loads are stable",
        caption="Regret: what the idlest quarter of the experts of earlier, since a fifth of the tokens, carries now "
        "over what the idlest quarter does, on average. Noise: the regret that sampling alone makes. Dashed: their "
        "limits. Loads are stable when both are below, the learning rate does not rise, and loads have left where they "
        "started.",
        alternative=f"{figures_phases.phases_title(run)}. {parts}. Regret, noise and learning rate against tokens.",
        draw=partial(figures_phases.phases_figure, run),
    )


def _cut(event: PruneEvent, number: int, num_events: int) -> Entry:
    layers, shown = list(event.loads), chosen_layers(list(event.loads))
    some = f" {len(shown)} of the {len(layers)} layers are shown." if len(shown) < len(layers) else ""
    rule = f" The rule: {rule_in_words(event)}. Alpha is on the mean load (left), beta on the running sum (right)."
    parts = "; ".join(f"layer {layer} loses {share(dropped_share(event, layer))} of its load" for layer in shown)
    return Entry(
        name=f"cut_{number}",
        heading="The cut" if num_events == 1 else f"Cut {number}",
        caption="Experts from the idlest to the busiest: load over the mean on a log scale (left) and running sum "
        f"(right). Crosses and orange: dropped; circles and blue: kept; dashed: the cut.{rule} Rounding to multiples "
        f"and floors can keep more experts than the limits ask for.{some}",
        alternative=f"{figures_loads.cut_title(event)}. {parts}.",
        draw=partial(figures_loads.cut_figure, event),
    )


def _kept(run: RunData) -> Entry:
    kept = {layer: len(ids) for layer, ids in sorted(run.first_ids(len(run.events)).items())}
    return Entry(
        name="experts_kept",
        heading="Experts kept in each layer",
        caption="Whole bar: experts at the start of the run; solid part: experts after the last pruning.",
        alternative=f"{figures_kept.kept_title(run)}. "
        + "; ".join(
            f"layer {layer}: {run.model.experts[layer]} before, {number} after" for layer, number in kept.items()
        )
        + ".",
        draw=partial(figures_kept.kept_figure, run),
    )


def _cost(run: RunData) -> Entry:
    bars = " Below: before the first pruning and after the last; all bars start at 0." if run.prunings else ""
    return Entry(
        name="cost",
        heading="Speed, parameters and memory",
        caption=f"Training tokens per second over the run.{bars}",
        alternative=f"{figures_run.cost_title(run)}. Tokens per second against tokens"
        + (", and bars for speed, parameters and memory before and after pruning." if run.prunings else "."),
        draw=partial(figures_run.cost_figure, run),
    )


def _ranks(run: RunData) -> Entry:
    balance = rank_balance(run)
    parts = (
        f"{ranks.num_ranks} ranks: {max_over_mean(ranks.layers, 'before'):.2f} before, "
        f"{max_over_mean(ranks.layers, 'after'):.2f} after"
        for ranks in balance.ranks
    )
    source = "the loads the last change was decided on" if run.events else "the loads of the last window"
    ran = next((one.num_ranks for event in reversed(run.events) if (one := placed(event))), None)
    own = f"the run itself placed its experts on {ran} ranks" if ran else "the run itself did not place its experts"
    return Entry(
        name="rank_loads",
        heading="Load of each rank, old order and rearranged",
        caption="What expert parallelism would see: each rank holds the same number of experts, in the order of their "
        "first ids (left) or rearranged by LAEP's greedy rule (right). Dot: one layer; bar: all layers together; "
        "line: a fair share. max / mean is the busiest rank over the mean, summed over layers, because a step waits "
        f"for the busiest rank in each layer. Computed from {source}; {own}.",
        alternative=f"{figures_kept.ranks_title(run)}. Busiest rank over mean: {'; '.join(parts)}.",
        draw=partial(figures_kept.ranks_figure, run),
    )
