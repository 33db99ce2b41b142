"""The figure of the phases: what LAEP waited for, beside the learning rate. A run in, a matplotlib Figure out."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateur.reporting.numbers import stretches
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import SMALL, Theme, end_labels, event_lines, new_figure, note, style, token_axis
from secateur.reporting.words import share

FAINTEST = 1e-4  # of the tokens: the log axis ends there
COLOURS = {
    "begin": "grid",
    "warm-up": "control",
    "unknown": "muted",
    "unlearned": "before",
    "moving": "dropped",
    "stable": "limit",
}


def has_phases(run: RunData) -> bool:
    """Releases before recorded none."""
    return any(window.phase for window in run.windows)


def phases_title(run: RunData) -> str:
    """What the figure shows, in one line."""
    stable = next((window for window in run.windows if window.phase == "stable"), None)
    if stable is not None:
        return f"Loads were stable at step {stable.step}, {share(stable.tokens / max(run.tokens, 1))} into the run"
    last = next((window.phase for window in reversed(run.windows) if window.phase), "begin")
    return f"Loads have not been stable; the last phase is {last}"


def phases_figure(run: RunData, theme: Theme) -> Figure:
    """Regret and noise (shares of the tokens, log scale) with their limits, the phases, and the learning rate."""
    figure = new_figure(theme, phases_title(run), height=4.6)
    strip, axes, below = figure.subplots(3, 1, sharex=True, height_ratios=[0.35, 3, 1.2])
    _strip(strip, theme, run)
    style(axes, theme, y="share of the tokens")
    axes.tick_params(labelbottom=False)
    config = run.info["config"] if isinstance(run.info.get("config"), dict) else {}
    labels = []
    for name, colour in (("regret", theme.run), ("noise", theme.control)):
        values = [getattr(window, name) for window in run.windows]
        shown = [math.nan if value is None else max(value, FAINTEST) for value in values]
        if not all(map(math.isnan, shown)):
            tokens = [window.tokens for window in run.windows]
            axes.plot(tokens, shown, color=colour, marker="o", markersize=2.5, linewidth=1.2)
            labels.append((next(value for value in reversed(shown) if not math.isnan(value)), name, colour))
        limit = config.get(f"max_{name}")
        if isinstance(limit, int | float) and limit > FAINTEST:
            axes.axhline(limit, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
    if labels:
        axes.set_yscale("log")
        axes.set_ylim(FAINTEST / 1.5, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    else:
        note(axes, theme, "too few windows yet")
    style(below, theme, x="tokens", y="learning rate")
    rates = [(w.tokens, w.learning_rate) for w in run.windows if w.learning_rate is not None]
    if rates:
        below.plot(*zip(*rates, strict=True), color=theme.ink, linewidth=1.2)
        below.set_ylim(bottom=0)
    below.yaxis.set_major_locator(MaxNLocator(3))
    token_axis(below, run.windows[-1].tokens if run.windows else run.tokens)
    for panel in (axes, below):
        event_lines(panel, theme, [event.tokens for event in run.prunings], labels=False)
    if len(labels) > 1 and labels[0][0] == labels[1][0]:  # both at the floor
        labels = [(labels[0][0], "regret, noise", theme.ink)]
    _log_end_labels(axes, labels)
    return figure


def _strip(axes: Axes, theme: Theme, run: RunData) -> None:
    """The phases as blocks in a row, each with its name where there is room."""
    style(axes, theme, grid="")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelbottom=False, length=0)
    axes.set_ylim(0, 1)
    whole = run.windows[-1].tokens if run.windows else 1
    for phase, begin, end in stretches(run.windows):
        axes.axvspan(begin, end, color=getattr(theme, COLOURS[phase]), alpha=0.75, linewidth=0)
        if (end - begin) / whole > 0.014 * len(phase):
            axes.text((begin + end) / 2, 0.5, phase, ha="center", va="center", fontsize=SMALL, color=theme.ink)


def _log_end_labels(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """`end_labels` places by the linear value: give it the position on the log axis instead."""
    if not labels:
        return
    low, high = axes.get_ylim()
    placed = [(axes.transData.transform((0, value))[1], name, colour) for value, name, colour in labels]
    bottom, top = (axes.transData.transform((0, value))[1] for value in (low, high))
    end_labels(axes, [(low + (high - low) * (y - bottom) / (top - bottom), name, colour) for y, name, colour in placed])
