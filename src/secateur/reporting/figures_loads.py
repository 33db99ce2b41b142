"""Figures of the loads: each expert over time, and the cut that each pruning made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from secateur.reporting.numbers import ascending, chosen_layers, dropped_share, limit, load_history
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import SMALL, TEXT, Theme, event_lines, new_figure, note, style, token_axis
from secateur.reporting.words import share
from secateur.surgery.events import PruneEvent

FAINTEST = 1 / 1024


def load_over_time_title(run: RunData) -> str:
    """What the heat maps show, in one line."""
    spread = _spread(run)
    if not run.windows:
        return "No loads have been recorded yet"
    if spread is None:
        return "In every layer some expert gets no token at the end"
    return f"Busiest over idlest expert of a layer: up to {spread:.0f} times"


def _spread(run: RunData) -> float | None:
    """Largest busiest over idlest load among the layers of the last window where every expert got a token."""
    layers = run.windows[-1].layers.values() if run.windows else []
    return max((max(loads) / min(loads) for loads in layers if min(loads) > 0), default=None)


def load_over_time_figure(run: RunData, theme: Theme) -> Figure:
    """One heat map a layer: tokens across, first expert ids up, colour = load over mean load; blank = dropped."""
    layers = chosen_layers(list(run.model.experts))
    columns = 2 if len(layers) > 1 else 1
    rows = math.ceil(len(layers) / columns)
    figure = new_figure(theme, load_over_time_title(run), height=1.2 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    histories = {layer: load_history(run, layer) for layer in layers}
    scale = _scale([history.ratio for history in histories.values()])
    image = None
    for axes, layer in zip(panels.flat, layers, strict=False):
        style(axes, theme, title=f"layer {layer}", grid="")
        # Hatched background: it stays visible where an expert is gone.
        axes.set_facecolor(theme.background)
        axes.patch.set(hatch="////", edgecolor=theme.grid, linewidth=0)
        history = histories[layer]
        if run.windows:
            image = axes.pcolormesh(
                history.edges,
                np.arange(run.model.experts[layer] + 1) - 0.5,
                np.maximum(history.ratio, FAINTEST / 4),
                cmap="viridis",
                norm=scale,
                rasterized=True,
            )
        else:
            note(axes, theme, "no window yet")
        axes.set_ylim(-0.5, run.model.experts[layer] - 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        token_axis(axes, run.windows[-1].tokens if run.windows else run.tokens)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        event_lines(axes, theme, [event.tokens for event in run.prunings], labels=False)
    for axes in panels[-1]:
        axes.set_xlabel("tokens", fontsize=TEXT, color=theme.muted)
    for axes in panels[:, 0]:
        axes.set_ylabel("expert", fontsize=TEXT, color=theme.muted)
    if image is not None:
        _colour_bar(figure, theme, image, panels)
    return figure


def _colour_bar(figure: Figure, theme: Theme, image: QuadMesh, panels: Any) -> None:
    bar = figure.colorbar(image, ax=panels, location="bottom", aspect=50, shrink=0.9, extend="min")
    low, high = image.get_clim()
    powers = [4.0**power for power in range(round(math.log(low, 4)), round(math.log(high, 4)) + 1)]
    bar.ax.xaxis.set_major_locator(FixedLocator(powers))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _ratio(value)))
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=theme.muted, labelsize=SMALL, width=0.6, length=3)
    bar.set_label("load / mean load of the layer; hatched: dropped", fontsize=TEXT, color=theme.muted)
    bar.outline.set_visible(False)


def _scale(ratios: list[NDArray[np.float64]]) -> LogNorm:
    """Colours from the faintest to the strongest load, in powers of 4; the faintest of all share one colour."""
    known = np.concatenate([ratio[ratio > 0] for ratio in ratios])
    low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
    faintest = min(max(4.0 ** math.floor(math.log(low, 4)), FAINTEST), 1 / 16)
    return LogNorm(faintest, max(4.0, 4.0 ** math.ceil(math.log(high, 4))))


def _ratio(value: float) -> str:
    return f"{value:g}" if value >= 1 else f"1/{round(1 / value)}"


def cut_title(event: PruneEvent) -> str:
    """What the cut figure shows, in one line."""
    dropped = event.experts_before - event.experts_after
    part = share(event.rerouted_share)
    return f"Step {event.step}: {dropped} of {event.experts_before} experts go, with {part} of the load"


def cut_figure(event: PruneEvent, theme: Theme) -> Figure:
    """For each layer, the loads from idlest to busiest and their running sum, the limits, and the cut that was made."""
    layers = chosen_layers(list(event.loads))
    figure = new_figure(theme, cut_title(event), height=0.9 + 1.6 * len(layers))
    panels = figure.subplots(len(layers), 2, squeeze=False)
    for row, layer in enumerate(layers):
        _sorted_loads(panels[row, 0], theme, event, layer)
        _running_sum(panels[row, 1], theme, event, layer)
    for axes in panels[-1]:
        axes.set_xlabel("rank of the expert, idlest first", fontsize=TEXT, color=theme.muted)
    return figure


def _sorted_loads(axes: Axes, theme: Theme, event: PruneEvent, layer: int) -> None:
    loads = event.loads[layer]
    style(axes, theme, title=f"layer {layer}: {len(_dropped(event, layer))} of {len(loads)} dropped", y="load / mean")
    if not sum(loads):
        note(axes, theme, "no token was routed")
        return
    relative = [load * len(loads) / sum(loads) for load in loads]
    # A load of 0 has no place on a log axis: it stands below all others, in the row that is labelled 0.
    floor = min(value for value in relative if value) / 2
    order = ascending(loads)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(relative) / floor < 1e4 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    alpha = limit(event, "alpha", layer)
    axes.set_ylim(min(floor * 0.8, (alpha[0] if alpha else 1) / 3), max(relative) * 1.5)
    _experts(axes, theme, event, layer, [max(relative[expert], floor) for expert in order])
    if min(loads) == 0:
        _label(axes, (0, floor), "0", theme.muted, ha="right", va="center", shift=-5)
    if alpha is not None:
        axes.axhline(alpha[0], color=theme.limit, linewidth=1.2)
        _limit_text(axes, theme, "alpha", *alpha)


def _running_sum(axes: Axes, theme: Theme, event: PruneEvent, layer: int) -> None:
    loads, part = event.loads[layer], dropped_share(event, layer)
    style(axes, theme, title="" if part is None else f"{share(part)} of the load goes", y="running sum")
    if part is None:
        note(axes, theme, "no token was routed")
        return
    sums = np.cumsum([loads[expert] for expert in ascending(loads)]) / sum(loads)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_ylim(-0.02, 1.03)
    _experts(axes, theme, event, layer, sums.tolist())
    beta = limit(event, "beta", layer)
    if beta is not None:
        axes.axhline(beta[0], color=theme.limit, linewidth=1.2)
        _limit_text(axes, theme, "beta", *beta)


def _limit_text(axes: Axes, theme: Theme, name: str, value: float, given: bool) -> None:
    """In the upper left corner, which ascending values leave free."""
    text = f"{name} = {value:g}" if given else f"comes to {name} = {value:.2g}"
    axes.text(0.02, 0.95, text, transform=axes.transAxes, color=theme.limit, fontsize=TEXT, ha="left", va="top")


def _dropped(event: PruneEvent, layer: int) -> set[int]:
    plan = event.plan.layers.get(layer)
    return set(plan.dropped) if plan else set()


def _experts(axes: Axes, theme: Theme, event: PruneEvent, layer: int, values: list[float]) -> None:
    """A mark for each expert from the idlest on, and the line between dropped and kept.

    Where the two are mixed there is no such line, and the marks tell.
    """
    order, dropped = ascending(event.loads[layer]), _dropped(event, layer)
    size = 4 if len(order) <= 64 else 2.5
    for gone, colour, marker in ((True, theme.dropped, "x"), (False, theme.kept, "o")):
        places = [place for place, expert in enumerate(order) if (expert in dropped) == gone]
        # An empty curve that is not clipped would break the layout of the whole figure.
        if places:
            heights = [values[place] for place in places]
            axes.plot([place + 1 for place in places], heights, marker, color=colour, markersize=size, clip_on=False)
    axes.set_xlim(0.3, len(order) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if dropped and set(order[: len(dropped)]) == dropped:
        axes.axvline(len(dropped) + 0.5, color=theme.dropped, linewidth=1, linestyle=(0, (4, 2)))


def _label(axes: Axes, place: tuple[float, float], text: str, colour: str, *, ha: str, va: str, shift: int = 0) -> None:
    """A short text at (share of the width, value)."""
    up = {"top": -2, "bottom": 2, "center": 0}[va]
    axes.annotate(
        text,
        place,
        xycoords=axes.get_yaxis_transform(),
        xytext=(shift, up),
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=SMALL,
        color=colour,
    )
