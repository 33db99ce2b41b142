"""What rearranging the experts over expert-parallel ranks would do to this run's loads (LAEP, arXiv 2601.14327)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from secateur.placement import busiest_rank_lower_bound, greedy_with_room, rank_loads
from secateur.reporting.run_data import RunData

RANKS = (2, 4, 8)

Side = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class RankLoads:
    """One layer on R ranks: tokens per rank with the experts in ascending first id, and after rearrangement."""

    before: list[float]
    after: list[float]
    lower_bound: float


@dataclass(frozen=True, kw_only=True)
class RankBalance:
    """All layers on R ranks. `later` is the same placement under the loads of the last window, if there is one."""

    num_ranks: int
    layers: dict[int, RankLoads]
    later: dict[int, RankLoads]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The balance over ranks, what was left out and why, and the step whose loads it rests on."""

    step: int | None
    ranks: list[RankBalance]
    left_out: dict[int, str]


def max_over_mean(layers: dict[int, RankLoads], side: Side) -> float | None:
    """Busiest rank over the mean, summed over layers: a step waits for the busiest rank once in each layer."""
    loads = [layer.before if side == "before" else layer.after for layer in layers.values()]
    total = sum(sum(ranks) for ranks in loads)
    return sum(max(ranks) * len(ranks) for ranks in loads) / total if total else None


def rank_balance(run: RunData) -> Balance:
    """The experts left after the last pruning, on the loads it was decided on; without one, on the last window."""
    step, loads = _current_loads(run)
    left_out = {num_ranks: reason for num_ranks in RANKS if (reason := _why_not(run, loads, num_ranks))}
    return Balance(
        step=step,
        ranks=[_on_ranks(run, loads, num_ranks) for num_ranks in RANKS if num_ranks not in left_out],
        left_out=left_out,
    )


def _current_loads(run: RunData) -> tuple[int | None, dict[int, list[int]]]:
    """Step and loads in the current numbering."""
    if run.events:
        event = run.events[-1]
        plans = {layer: event.plan.layers.get(layer) for layer in run.model.experts}
        kept = {layer: plan.order if plan else range(len(event.loads[layer])) for layer, plan in plans.items()}
        return event.step, {layer: [event.loads[layer][old] for old in order] for layer, order in kept.items()}
    if run.windows:
        return run.windows[-1].step, {layer: list(loads) for layer, loads in run.windows[-1].layers.items()}
    return None, {}


def _why_not(run: RunData, loads: dict[int, list[int]], num_ranks: int) -> str:
    if not any(sum(load) for load in loads.values()):
        return "no loads are recorded yet"
    odd = [(layer, len(load)) for layer, load in loads.items() if len(load) % num_ranks]
    if not odd:
        return ""
    layer, count = odd[0]
    others = f", and {len(odd) - 1} more such layers" if len(odd) > 2 else ", and one more such layer"
    return f"layer {layer} has {count} experts, not a multiple of {num_ranks}{others if len(odd) > 1 else ''}"


def _on_ranks(run: RunData, loads: dict[int, list[int]], num_ranks: int) -> RankBalance:
    first = run.first_ids(len(run.events))
    last = run.windows[-1] if run.windows and run.events and run.windows[-1].step > run.events[-1].step else None
    layers, later = {}, {}
    for layer, load in loads.items():
        if not sum(load):
            continue
        by_first_id = sorted(range(len(load)), key=first[layer].__getitem__)
        # Ties follow the first ids, so that the current order does not matter.
        level = [by_first_id[new] for new in greedy_with_room([load[old] for old in by_first_id], num_ranks)]
        layers[layer] = _layer_on_ranks(load, by_first_id, level, num_ranks)
        if last and sum(last.layers[layer]):
            later[layer] = _layer_on_ranks(list(last.layers[layer]), by_first_id, level, num_ranks)
    return RankBalance(num_ranks=num_ranks, layers=layers, later=later)


def _layer_on_ranks(loads: list[int], before: list[int], after: list[int], num_ranks: int) -> RankLoads:
    return RankLoads(
        before=rank_loads(loads, before, num_ranks),
        after=rank_loads(loads, after, num_ranks),
        lower_bound=busiest_rank_lower_bound(loads, num_ranks),
    )


def balance_json(ranks: RankBalance) -> dict[str, Any]:
    """Busiest rank over the mean, with the loads of each rank."""
    return {
        "before": max_over_mean(ranks.layers, "before"),
        "after": max_over_mean(ranks.layers, "after"),
        "last_window": {
            "before": max_over_mean(ranks.later, "before"),
            "after": max_over_mean(ranks.later, "after"),
        }
        if ranks.later
        else None,
        "rank_loads": {
            str(layer): {"before": loads.before, "after": loads.after, "lower_bound": loads.lower_bound}
            for layer, loads in ranks.layers.items()
        },
    }
