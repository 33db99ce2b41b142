"""Figures of the run as a whole: its loss, its speed and its size. A run in, a matplotlib Figure out."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.reporting.numbers import Comparison, Speed, compare, last_eval, shared_evals, smooth, speed
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import (
    SMALL,
    Theme,
    count_formatter,
    end_labels,
    event_lines,
    new_figure,
    note,
    style,
    token_axis,
)
from secateur.reporting.words import change, count, loss, memory, signed


def loss_title(run: RunData) -> str:
    """What the loss figure shows, in one line."""
    versus, end = compare(run), last_eval(run)
    verb = "ends" if run.summary else "stands"
    if versus and run.prunings:
        difference = versus.difference
        if round(abs(difference), 3) == 0:
            return f"Validation loss with pruning {verb} where the control's does"
        side = "above" if difference > 0 else "below"
        return f"Validation loss with pruning {verb} {abs(difference):.3f} {side} the control's"
    if end is None:
        return "Training loss; no validation yet"
    return f"The validation loss {verb} at {loss(end.validation_loss)}"


def loss_figure(run: RunData, theme: Theme) -> Figure:
    """Training and validation loss (nats a token) against tokens, the control beside it, and their difference."""
    shared = shared_evals(run)
    figure = new_figure(theme, loss_title(run), height=5.2 if shared else 3.8)
    grid = figure.add_gridspec(2 if shared else 1, 1, height_ratios=[3, 1] if shared else [1])
    axes = figure.add_subplot(grid[0])
    style(axes, theme, y="loss (nats a token)", x="" if shared else "tokens")
    sides = [(run, theme.run, "with pruning" if run.prunings else "this run", "o")]
    if run.control:
        sides.insert(0, (run.control, theme.control, "control", "s"))
    labels = [label for side in sides if (label := _loss_curves(axes, *side))]
    token_axis(axes, max(side[0].tokens for side in sides))
    events = [event.tokens for event in run.prunings]
    event_lines(axes, theme, events)
    end_labels(axes, labels)
    if not labels:
        note(axes, theme, "no loss has been logged yet")
    if shared:
        below = figure.add_subplot(grid[1], sharex=axes)
        style(below, theme, x="tokens", y="difference", title="Validation loss minus the control's: above 0 is worse")
        axes.tick_params(labelbottom=False)
        _differences(below, theme, shared)
        event_lines(below, theme, events, labels=False)
    return figure


def _loss_curves(axes: Axes, run: RunData, colour: str, name: str, marker: str) -> tuple[float, str, str] | None:
    """Draws one run; returns the label for the end of its curve, if it has one."""
    label = None
    known = [(point.tokens, point.loss) for point in run.train if point.loss is not None]
    if known:
        tokens, losses = [point[0] for point in known], [point[1] for point in known]
        smoothed = smooth(losses)
        axes.plot(tokens, losses, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(tokens, smoothed, color=colour, linewidth=1.5)
        label = (smoothed[-1], name, colour)
    valid = {point.tokens: point.validation_loss for point in run.evals if point.validation_loss is not None}
    end = last_eval(run)
    if end and end.validation_loss is not None:
        valid[end.tokens] = end.validation_loss
    if valid:
        axes.plot(*zip(*valid.items(), strict=True), marker, color=colour, markersize=4.5, clip_on=False)
        at, last = list(valid.items())[-1]
        # Beside the last mark when that is the end of the curve, else beside the curve.
        label = (last if label is None or at >= run.tokens else label[0], f"{name}\nvalidation {last:.3f}", colour)
    return label


def _differences(axes: Axes, theme: Theme, shared: list[Comparison]) -> None:
    axes.axhline(0, color=theme.control, linewidth=1.2)
    tokens, differences = [point.tokens for point in shared], [point.difference for point in shared]
    axes.plot(tokens, differences, color=theme.run, marker="o", markersize=3.5, linewidth=1.2, clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(y=0.25)
    axes.annotate(
        signed(differences[-1], 3),
        (tokens[-1], differences[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
        color=theme.run,
        annotation_clip=False,
    )


def cost_title(run: RunData) -> str:
    """What the cost figure shows, in one line."""
    pace = speed(run)
    if not run.prunings:
        return f"Training runs at {count(pace.before)} tokens/s" if pace.before else "No speed has been logged yet"
    size = change(run.prunings[0].parameters_before, run.prunings[-1].parameters_after)
    faster = f", tokens/s {change(pace.before, pace.after)}" if pace.before and pace.after else ""
    return f"Parameters {size}{faster}"


def cost_figure(run: RunData, theme: Theme) -> Figure:
    """Tokens per second over the run; with prunings also speed, parameters and memory before and after."""
    rows = _before_and_after(run, speed(run)) if run.prunings else []
    figure = new_figure(theme, cost_title(run), height=2.7 + 0.72 * len(rows))
    grid = figure.add_gridspec(1 + len(rows), 1, height_ratios=[3, *[1] * len(rows)])
    axes = figure.add_subplot(grid[0])
    style(axes, theme, x="tokens", y="tokens/s")
    known = [(p.tokens, p.tokens_per_second) for p in run.train if p.tokens_per_second is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=theme.run, linewidth=1.1)
        axes.set_ylim(0, 1.12 * max(pace for _, pace in known))
    else:
        note(axes, theme, "no speed has been logged yet")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(count_formatter(max((pace for _, pace in known), default=1)))
    token_axis(axes, run.tokens)
    event_lines(axes, theme, [event.tokens for event in run.prunings])
    for index, (name, before, after, text) in enumerate(rows, start=1):
        _pair(figure.add_subplot(grid[index]), theme, f"{name}: {change(before, after)}", (before, after), text)
    return figure


def _before_and_after(run: RunData, pace: Speed) -> list[tuple[str, float, float, tuple[str, str]]]:
    first, last = run.prunings[0], run.prunings[-1]
    rows: list[tuple[str, float, float, tuple[str, str]]] = []
    if pace.before and pace.after:
        rows.append(("Tokens per second", pace.before, pace.after, (count(pace.before), count(pace.after))))
    sizes = (first.parameters_before, last.parameters_after)
    rows.append(("Parameters", *sizes, (count(sizes[0]), count(sizes[1]))))
    for key, name in (("parameters_bytes", "Parameter memory"), ("optimizer_bytes", "Optimizer memory")):
        before, after = getattr(first.memory_before, key), getattr(last.memory_after, key)
        rows.append((name, before, after, (memory(before), memory(after))))
    return rows


def _pair(axes: Axes, theme: Theme, title: str, values: tuple[float, float], texts: tuple[str, str]) -> None:
    """Two bars that start at 0, with their values written beside them."""
    style(axes, theme, title=title, grid="")
    axes.spines["bottom"].set_visible(False)
    axes.barh([1, 0], values, height=0.72, color=[theme.before, theme.run])
    axes.set_xlim(0, max(*values, 1e-12) * 1.16)
    axes.set_xticks([])
    axes.set_yticks([1, 0], ["before", "after"])
    axes.tick_params(axis="y", length=0)
    for position, value, text in zip((1, 0), values, texts, strict=True):
        axes.annotate(
            text,
            (value, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=theme.ink,
        )
