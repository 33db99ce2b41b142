"""The report as one HTML file: no script, no request to anywhere, figures inside. Values in, text out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from secateur.reporting.gallery import Entry
from secateur.reporting.html import document, section, table
from secateur.reporting.numbers import compare, dropped_share, last_eval, placed, rule_in_words, speed
from secateur.reporting.ranks import RankBalance, max_over_mean, rank_balance
from secateur.reporting.run_data import RunData
from secateur.reporting.theme import DARK, LIGHT
from secateur.reporting.words import NBSP, change, count, loss, memory, share, signed, summary_paragraph
from secateur.surgery.events import PruneEvent


def render(run: RunData, entries: Sequence[Entry], images: Mapping[tuple[str, str], bytes]) -> str:
    """The page. `images` holds the PNG of each (entry name, theme name)."""
    title = f"Secateur: pre-training {run.model.model_type}"
    state = "" if run.summary else '<p class="note">This run is not finished: everything below is as of now.</p>'
    parts = [
        f"<h1>{escape(title)}</h1>",
        state,
        f'<p class="lead">{escape(summary_paragraph(run))}</p>',
        section("Key numbers", _key_numbers(run) + _control_speed(run)),
        section("Validation loss", _loss_table(run)),
        section("Prunings", _events(run)),
        *(_figure(entry, images) for entry in entries),
        section("Rearrangements", _rearrangements(run)),
        section("Balance over ranks", _balance(run)),
        section("How this was run", _provenance(run)),
    ]
    return document(title, parts)


def _figure(entry: Entry, images: Mapping[tuple[str, str], bytes]) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(images[entry.name, theme.name]).decode('ascii')}"
        for theme in (LIGHT, DARK)
    )
    width, height = _png_size(images[entry.name, LIGHT.name])
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img id="{escape(entry.name)}" src="{light}" width="{width}" height="{height}" '
        f'alt="{escape(entry.alternative)}"></picture>'
    )
    return section(entry.heading, f"<figure>\n{picture}\n<figcaption>{escape(entry.caption)}</figcaption>\n</figure>")


def _png_size(content: bytes) -> tuple[int, int]:
    """Width and height from the first chunk of a PNG, so that the page does not jump while it loads."""
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def _key_numbers(run: RunData) -> str:
    """What there was, what there is and the change; a run without pruning has one column."""
    pace, num_experts = speed(run), sum(run.model.experts.values())
    if not run.prunings:
        rows = [["experts in all layers", count(num_experts)], ["parameters", count(run.model.parameters)]]
        return table(("", "now"), [*rows, ["tokens per second", count(pace.before) if pace.before else "unknown"]])
    first, last = run.prunings[0], run.prunings[-1]
    rows = [
        _key_row("experts in all layers", num_experts, last.experts_after, count),
        _key_row("parameters", run.model.parameters, last.parameters_after, count),
    ]
    for key, name in (("parameters_bytes", "parameter memory"), ("optimizer_bytes", "optimizer memory")):
        rows.append(_key_row(name, getattr(first.memory_before, key), getattr(last.memory_after, key), memory))
    rows.append(_key_row("tokens per second", pace.before, pace.after, count))
    return table(("", "before", "after", "change"), rows)


def _control_speed(run: RunData) -> str:
    """Two runs on one machine differ by chance too; the control's speed helps to judge by how much."""
    pace = speed(run.control).before if run.control else None
    return f"<p>The control ran at {escape(count(pace))} tokens per second.</p>" if pace else ""


def _key_row(name: str, before: float | None, after: float | None, say: Callable[[float], str]) -> list[str]:
    texts = ["unknown" if value is None else say(value) for value in (before, after)]
    return [name, *texts, change(before, after) if before and after is not None else ""]


def _loss_table(run: RunData) -> str:
    """All domains and each of them, with the control's beside it."""
    mine = last_eval(run)
    if mine is None:
        return "<p>No validation has been logged yet.</p>"
    theirs, versus = last_eval(run.control) if run.control else None, compare(run)
    names: dict[str, Any] = {"all domains": (mine.validation_loss, theirs and theirs.validation_loss)}
    for name, value in mine.by_domain.items():
        names[name] = (value, theirs and theirs.by_domain.get(name))
    head = ("", "this run", "control", "difference") if run.control else ("", "this run")
    rows = []
    for name, (value, other) in names.items():
        row = [name, loss(value)]
        if run.control:
            row += [loss(other), _difference(value, other)]
        rows.append(row)
    losses = table(head, rows)
    if theirs and theirs.tokens != mine.tokens:
        losses += (
            f"<p>The two stand at different numbers of tokens: {escape(count(mine.tokens))} here and "
            f"{escape(count(theirs.tokens))} in the control. "
            + (
                f"After {escape(count(versus.tokens))} tokens, where both were validated, the difference is "
                f"{_difference(versus.run, versus.control)}.</p>"
                if versus
                else "They share no validation point.</p>"
            )
        )
    return losses


def _difference(value: float | None, other: float | None) -> str:
    if value is None or other is None:
        return "unknown"
    return signed(value - other, 3)


def _events(run: RunData) -> str:
    if not run.prunings:
        return "<p>No expert was dropped in this run.</p>" if run.summary else "<p>No expert has been dropped yet.</p>"
    head = ("step", "tokens", "reason", "rule", "experts", "parameters", "tokens re-routed", "time", "oracle")
    prunings = table(head, [_event_row(event) for event in run.prunings])
    layers = "".join(_event_layers(event) for event in run.prunings)
    return (
        f"{prunings}\n<p>Oracle: the largest difference between the logits of the pruned model and those of the "
        f"unpruned one with the dropped experts barred, at the moment of pruning. 0 means bit for bit equal.</p>\n"
        f"{layers}"
    )


def _event_row(event: PruneEvent) -> list[str]:
    return [
        str(event.step),
        count(event.tokens),
        event.reason,
        rule_in_words(event),
        _from_to(str(event.experts_before), str(event.experts_after)),
        f"{_from_to(count(event.parameters_before), count(event.parameters_after))} "
        f"({change(event.parameters_before, event.parameters_after)})",
        share(event.rerouted_share),
        f"{event.surgery_seconds:.2f}{NBSP}s",
        "not run" if event.oracle_max_abs_difference is None else f"{event.oracle_max_abs_difference:g}",
    ]


def _from_to(before: str, after: str) -> str:
    return f"{before}{NBSP}\N{RIGHTWARDS ARROW}{NBSP}{after}"


def _event_layers(event: PruneEvent) -> str:
    rows = [
        [
            str(layer),
            str(plan.experts_before),
            str(plan.experts_after),
            share(dropped_share(event, layer)),
            " ".join(map(str, plan.dropped)) or "none",
        ]
        for layer, plan in event.plan.layers.items()
    ]
    layers = table(("layer", "before", "after", "load re-routed", "dropped (numbering at that step)"), rows)
    return f"<details><summary>Step {event.step}, layer by layer</summary>\n{layers}\n</details>"


def _rearrangements(run: RunData) -> str:
    events = [(event, one) for event in run.events if (one := placed(event))]
    if not events:
        return ""
    head = ("step", "at", "ranks", "old order", "rearranged", "over lower bound", "experts moved", "time")
    rows = [
        [
            str(event.step),
            "no pruning" if event.reason == "rearrange" else "the pruning",
            str(one.num_ranks),
            *(f"{value:.3f}" for value in (one.balance_before, one.balance_after, one.over_bound)),
            str(one.moved),
            f"{event.surgery_seconds:.2f}{NBSP}s",
        ]
        for event, one in events
    ]
    return f"<p>Busiest rank over the mean, mean over the layers.</p>\n{table(head, rows)}"


def _balance(run: RunData) -> str:
    balance = rank_balance(run)
    head = ["ranks", "old order", "rearranged", "lower bound"]
    rows = [_balance_row(ranks) for ranks in balance.ranks]
    later = any(ranks.later for ranks in balance.ranks)
    if later:
        head += ["old order, last window", "rearranged, last window"]
    left_out = "".join(
        f"<p>{num_ranks} ranks are left out: {escape(reason)}.</p>" for num_ranks, reason in balance.left_out.items()
    )
    text = (
        "<p>Busiest rank over the mean, all layers together: 1 is level, and no order is below the lower bound.</p>"
        if rows
        else ""
    )
    if later:
        text += (
            "<p>The last window tells whether a placement that was chosen at the pruning still fits the loads at the "
            "end of the run.</p>"
        )
    return f"{text}{table(head, rows)}{left_out}"


def _balance_row(ranks: RankBalance) -> list[str]:
    mean = sum(sum(layer.before) for layer in ranks.layers.values()) / ranks.num_ranks
    bound = sum(layer.lower_bound for layer in ranks.layers.values()) / mean
    values = [max_over_mean(ranks.layers, "before"), max_over_mean(ranks.layers, "after"), bound]
    if ranks.later:
        values += [max_over_mean(ranks.later, "before"), max_over_mean(ranks.later, "after")]
    return [str(ranks.num_ranks), *("unknown" if value is None else f"{value:.3f}" for value in values)]


def _provenance(run: RunData) -> str:
    versions = {"secateur": run.info.get("secateur"), **run.info["versions"]}
    facts = versions | run.info["hardware"]
    if run.summary and run.summary.peak_memory_bytes:
        facts["peak_memory_bytes"] = run.summary.peak_memory_bytes
    rows = [_fact(name, value) for name, value in facts.items()]
    command = run.info.get("command")
    shown = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    whole = json.dumps({key: run.info.get(key) for key in ("config", "model", "data")}, indent=2, ensure_ascii=False)
    return (
        f"{table(('', ''), rows)}\n<p>Command:</p>\n<pre>{escape(shown)}</pre>\n"
        f"<details><summary>Configuration, model and data</summary>\n<pre>{escape(whole)}</pre>\n</details>"
    )


def _fact(name: str, value: Any) -> list[str]:
    """("memory_bytes", 2**30) -> "memory", "1.00 GiB"."""
    if name.endswith("_bytes") and isinstance(value, int | float):
        return [name.removesuffix("_bytes").replace("_", " "), memory(value)]
    return [name, "none" if value is None else str(value)]
