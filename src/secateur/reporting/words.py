"""The report in plain words: numbers with units, and the paragraph that opens the page."""

from __future__ import annotations

import math

from secateur.reporting.numbers import Comparison, compare, last_eval, speed
from secateur.reporting.ranks import RankBalance, max_over_mean, rank_balance
from secateur.reporting.run_data import RunData
from secateur.reporting.run_files import UnprunedFile
from secateur.surgery.events import PruneEvent

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NBSP = "\N{NO-BREAK SPACE}"
REASONS = {
    "stable": "the loads of the experts were found stable",
    "step": "the step that the user had set for pruning was reached",
    "tokens": "the number of tokens that the user had set for pruning was reached",
}


def count(value: float) -> str:
    """3876224 -> "3.88 M"; 9876 -> "9,876"."""
    if abs(value) < 1e4:
        return f"{round(value):,}"
    size, name = next(unit for unit in UNITS if abs(value) >= unit[0])
    return f"{_significant(value / size)}{NBSP}{name}"


def memory(num_bytes: float) -> str:
    """Bytes -> "14.8 MiB"."""
    for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= size:
            return f"{_significant(num_bytes / size)}{NBSP}{name}"
    return f"{round(num_bytes)}{NBSP}B"


def _significant(value: float) -> str:
    """Three digits, or all before the point."""
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def change(before: float, after: float) -> str:
    """The relative change, "-27.3 %" with a real minus sign."""
    if not before:
        return "no value"
    return f"{signed(100 * (after / before - 1), 1)}{NBSP}%"


def signed(value: float, places: int) -> str:
    """ "+0.020" or, with a real minus sign, its opposite."""
    return f"{value:+.{places}f}".replace("-", "\N{MINUS SIGN}")


def share(value: float | None) -> str:
    """0.031 -> "3.1 %"."""
    return "unknown" if value is None else f"{100 * value:.1f}{NBSP}%"


def loss(value: float | None) -> str:
    """A loss in nats a token, three places."""
    return "unknown" if value is None else f"{value:.3f}"


def event_sentence(event: PruneEvent) -> str:
    """What one pruning did."""
    dropped = event.experts_before - event.experts_after
    return (
        f"At step {event.step} ({count(event.tokens)} tokens) {REASONS[event.reason]} and {dropped} of "
        f"{event.experts_before} experts were dropped: {count(event.parameters_before)} parameters became "
        f"{count(event.parameters_after)} ({change(event.parameters_before, event.parameters_after)}), and "
        f"{share(event.rerouted_share)} of the routed tokens had to go to another expert."
    )


def comparison_sentence(versus: Comparison, finished: bool) -> str:
    """Pruned against control, without sugar."""
    difference = versus.difference
    verdict = (
        "equal to three places"
        if round(abs(difference), 3) == 0
        else f"{abs(difference):.3f} {'worse (higher)' if difference > 0 else 'better (lower)'}"
    )
    when = "At the end" if finished else f"After {count(versus.tokens)} tokens, the last point that both have reached,"
    return (
        f"{when} the validation loss is {loss(versus.run)} with pruning and {loss(versus.control)} in the control "
        f"without it: {verdict}. One run of each does not show how much of that is chance."
    )


def unpruned_sentence(unpruned: UnprunedFile) -> str:
    """What the pruning that did not come would have done."""
    waited = f"The next pruning did not come: {unpruned.waits_for}."
    if unpruned.dropped is None:
        return waited
    experts = sum(map(len, unpruned.dropped.values()))
    return (
        f"{waited} At the end it would have dropped {experts} experts, with {share(unpruned.rerouted_share)} of the "
        "routed tokens."
    )


def summary_paragraph(run: RunData) -> str:
    """The run in a few sentences that an engineer can check against the tables below them."""
    state = "finished after" if run.summary else "is not finished; it has seen"
    sentences = [
        f"This {run.model.model_type} model of {len(run.model.experts)} layers with experts {state} "
        f"{count(run.tokens)} tokens."
    ]
    sentences += [event_sentence(event) for event in run.prunings]
    if not run.prunings:
        ending = "No expert was dropped" if run.summary else "No expert has been dropped so far"
        sentences.append(f"{ending}: all {sum(run.model.experts.values())} experts are in place.")
    if run.unpruned is not None:
        sentences.append(unpruned_sentence(run.unpruned))
    pace = speed(run)
    if pace.before and pace.after:
        sentences.append(
            f"Training ran at {count(pace.before)} tokens/s before and {count(pace.after)} tokens/s after "
            f"({change(pace.before, pace.after)})."
        )
    sentences += _loss_sentences(run)
    sentences += [_balance_sentence(ranks) for ranks in rank_balance(run).ranks[-1:]]
    return " ".join(sentences)


def _loss_sentences(run: RunData) -> list[str]:
    versus, end = compare(run), last_eval(run)
    if run.control and versus and run.prunings:
        both_finished = bool(run.summary and run.control.summary and versus.tokens == run.tokens == run.control.tokens)
        return [comparison_sentence(versus, both_finished)]
    missing = ["The control cannot be compared with yet."] if run.control else []
    if end is None:
        return ["No validation has been logged.", *missing]
    if end.validation_loss is None:
        return ["The last validation loss is not a finite number.", *missing]
    return [f"The {'final' if run.summary else 'last'} validation loss is {loss(end.validation_loss)}.", *missing]


def _balance_sentence(ranks: RankBalance) -> str:
    before, after = max_over_mean(ranks.layers, "before"), max_over_mean(ranks.layers, "after")
    return (
        f"On {ranks.num_ranks} ranks the busiest one would carry {before:.2f} times the mean load in the old order "
        f"and {after:.2f} times after rearrangement."
    )
