"""How every figure looks: colours, sizes and the few parts that all of them share. No pyplot, so no global state.

The colours of the curves are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateur.reporting.words import UNITS

WIDTH = 6.0
DPI = 150
TEXT, SMALL, TITLE = 9.8, 9.0, 11.5


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours by what they mean, so that a colour means the same in every figure."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    before: str
    run: str
    control: str
    kept: str
    dropped: str
    limit: str


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1b1f24",
    muted="#5b636d",
    grid="#e3e6ea",
    before="#a9b1ba",
    run="#0072b2",
    control="#8a6d00",
    kept="#0072b2",
    dropped="#d55e00",
    limit="#007d5c",
)
DARK = Theme(
    name="dark",
    background="#16191d",
    ink="#e8eaed",
    muted="#a4acb6",
    grid="#2c3138",
    before="#5d6671",
    run="#56b4e9",
    control="#e6c34a",
    kept="#56b4e9",
    dropped="#f28340",
    limit="#2fc79b",
)
THEMES = (LIGHT, DARK)


def new_figure(theme: Theme, title: str, height: float) -> Figure:
    """An empty figure, `height` inches high, with its title at the left."""
    figure = Figure(figsize=(WIDTH, height), facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 62), x=0.012, ha="left", fontsize=TITLE, color=theme.ink, fontweight="bold")
    return figure


def style(axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    """Calm axes: two thin lines, a thin grid behind the data, a title at the left."""
    axes.set_facecolor(theme.background)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.muted)
        axes.spines[side].set_linewidth(0.6)
    axes.tick_params(colors=theme.muted, labelsize=SMALL, width=0.6, length=3)
    axes.tick_params(which="minor", width=0.4, length=1.5, color=theme.muted)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_title(title, loc="left", fontsize=TEXT, color=theme.ink)
    axes.set_xlabel(x, fontsize=TEXT, color=theme.muted)
    axes.set_ylabel(y, fontsize=TEXT, color=theme.muted)


def token_axis(axes: Axes, tokens: int) -> None:
    """The x axis from 0 to `tokens`, labelled "0.5 M"."""
    axes.set_xlim(0, max(tokens, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(count_formatter(tokens))


def count_formatter(largest: float) -> FuncFormatter:
    """Tick labels in the one unit that fits the largest: "0.5 M", "1 M"."""
    size, name = next(((size, f" {name}") for size, name in UNITS if largest >= size), (1.0, ""))
    return FuncFormatter(lambda value, _: f"{value / size:g}{name}" if value else "0")


def end_labels(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """(value, text, colour): names beside the right end of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    apart = 0.13
    placed = -apart
    lowest_first = sorted(labels)
    for position, (value, text, colour) in enumerate(lowest_first):
        room_above = 1 - apart * (len(lowest_first) - 1 - position)
        placed = min(max((value - low) / (high - low), placed + apart), max(room_above, placed + apart))
        axes.annotate(
            text,
            (1, placed),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=colour,
        )


def event_lines(axes: Axes, theme: Theme, tokens: list[int], *, labels: bool = True) -> None:
    """A thin line at each pruning, numbered above the axes when there are several."""
    for number, position in enumerate(tokens, start=1):
        axes.axvline(position, color=theme.dropped, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        if labels:
            text = "pruning" if len(tokens) == 1 else f"pruning {number}" if number == 1 else str(number)
            axes.annotate(
                text,
                (position, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL,
                color=theme.dropped,
            )


def note(axes: Axes, theme: Theme, text: str) -> None:
    """Says in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=TEXT, color=theme.muted)


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
