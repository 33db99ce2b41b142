"""Figures of what a pruning leaves: experts in each layer, and the load of expert-parallel ranks."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.reporting.ranks import RankBalance, Side, max_over_mean, rank_balance
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import TEXT, Theme, new_figure, style


def kept_title(run: RunData) -> str:
    """What the bars show, in one line."""
    kept = {len(ids) for ids in run.first_ids(len(run.events)).values()}
    before, after = sum(run.model.experts.values()), run.events[-1].experts_after
    each = f"each layer keeps {min(kept)}" if len(kept) == 1 else f"layers keep {min(kept)} to {max(kept)}"
    return f"{after} of {before} experts stay; {each}"


def kept_figure(run: RunData, theme: Theme) -> Figure:
    """Experts in each layer at the start (outline) and after the last pruning (solid)."""
    figure = new_figure(theme, kept_title(run), height=3.0)
    axes = figure.add_subplot()
    style(axes, theme, x="layer", y="experts")
    layers = list(run.model.experts)
    kept = [len(ids) for _, ids in sorted(run.first_ids(len(run.events)).items())]
    places = range(len(layers))
    axes.bar(
        places,
        list(run.model.experts.values()),
        width=0.72,
        facecolor="none",
        edgecolor=theme.dropped,
        linewidth=1.1,
        hatch="////",
    )
    axes.bar(places, kept, width=0.72, color=theme.kept, edgecolor=theme.kept, linewidth=1.1)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    every = math.ceil(len(layers) / 20)
    axes.set_xticks(list(places)[::every], [str(layer) for layer in layers[::every]])
    if len(layers) <= 24:
        for place, number in zip(places, kept, strict=True):
            axes.text(place, number / 2, str(number), ha="center", va="center", fontsize=TEXT, color=theme.background)
    return figure


def ranks_title(run: RunData) -> str:
    """What the rank figure shows, in one line."""
    balance = rank_balance(run)
    if not balance.ranks:
        return "No rank count divides the experts of every layer"
    ranks = balance.ranks[-1]
    before, after = max_over_mean(ranks.layers, "before"), max_over_mean(ranks.layers, "after")
    return f"On {ranks.num_ranks} ranks, max / mean load goes from {before:.2f} to {after:.2f}"


def ranks_figure(run: RunData, theme: Theme) -> Figure:
    """For each number of ranks the load of each rank over the mean: a dot a layer, a bar for all layers together."""
    choices = rank_balance(run).ranks
    figure = new_figure(theme, ranks_title(run), height=0.8 + 2.1 * max(1, len(choices)))
    panels = figure.subplots(max(1, len(choices)), 2, squeeze=False, sharey="row")
    for row, ranks in zip(panels, choices, strict=False):
        sides: tuple[tuple[Axes, Side, str], ...] = ((row[0], "before", "old order"), (row[1], "after", "rearranged"))
        for axes, side, name in sides:
            colour = theme.dropped if side == "before" else theme.kept
            style(
                axes,
                theme,
                title=f"{ranks.num_ranks} ranks, {name}: max / mean {max_over_mean(ranks.layers, side):.2f}",
            )
            _rank_bars(axes, theme, ranks, side, colour)
        row[0].set_ylabel("load / mean", fontsize=TEXT, color=theme.muted)
    for axes in panels[-1]:
        axes.set_xlabel("rank", fontsize=TEXT, color=theme.muted)
    return figure


def _rank_bars(axes: Axes, theme: Theme, ranks: RankBalance, side: Side, colour: str) -> None:
    per_layer = np.array([layer.before if side == "before" else layer.after for layer in ranks.layers.values()])
    places = np.arange(ranks.num_ranks)
    together = per_layer.sum(axis=0) / per_layer.sum(axis=0).mean()
    relative = per_layer / per_layer.mean(axis=1, keepdims=True)
    axes.bar(places, together, width=0.7, color=colour, alpha=0.35)
    shift = np.linspace(-0.22, 0.22, len(relative)) if len(relative) > 1 else np.zeros(1)
    axes.plot((places + shift[:, None]).ravel(), relative.ravel(), "o", color=colour, markersize=3)
    axes.axhline(1, color=theme.ink, linewidth=0.8)
    axes.set_xticks(places)
    axes.set_ylim(bottom=0)
