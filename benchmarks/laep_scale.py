"""LAEP at the size of the released model, on paper: its list of retained experts through plan, placement and costs.

    python benchmarks/laep_scale.py

Computed, not measured: nobody ran 824 ranks. What is measured here is how fast this machine gathers rows and decides;
everything else is arithmetic on these assumptions.

* The model: 103 layers of 64 experts, hidden 4608, SwiGLU of 16384, linear router without bias (arXiv 2601.14327).
* The layout: 8 expert-parallel ranks a layer and one layer a group, 8 x 103 = 824 ranks, no copies of experts. Before,
  rank r of a layer's group holds its experts 8 r to 8 r + 7.
* State: bf16 weights, and float32 master weights and two moments: 14 bytes a parameter (`--bytes`).
* Loads: lognormal, seeded; the least used experts go, as many as the released model lacks.
* Surgery: each rank writes the rows it owns afterwards into new tensors (a gather). Rearrangement adds a gather of the
  rows that leave the rank into a buffer, and the time on the wire. All groups work at the same time: the slowest rank
  counts.
* Network: `--bandwidth` GB/s a rank in each direction, with nothing else on it.

Its result is laep_scale.json.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from record import parser_for, show, store
from secateur.placement import balance, place, rank_loads
from secateur.placement.moves import order_of, ranks_of, relabel
from secateur.plans import LayerPlan, Plan

# (layers, experts retained of 64), layer 0 first
RELEASED = (
    *((1, 40), (1, 48), (1, 24), (1, 16), (1, 24), (2, 16), (1, 24), (2, 32), (3, 24), (3, 40)),
    *((69, 48), (8, 40), (6, 32), (2, 24), (1, 16), (1, 8)),
)
RETAINED = tuple(count for layers, count in RELEASED for _ in range(layers))
EXPERTS, RANKS = 64, 8
HIDDEN, INTERMEDIATE = 4608, 16384
EXPERT_PARAMETERS = 3 * HIDDEN * INTERMEDIATE + HIDDEN  # with its row of the router
REMOVED = 505_541_357_568  # published: 33.34 % of the unpruned model


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's decision: who stays, who stands where, and what that moves."""

    plan: LayerPlan
    balance_before: float
    balance_after: float
    over_bound: float
    received: tuple[int, ...]  # (R,) experts that come from another rank
    sent: tuple[int, ...]  # (R,) experts that leave for another rank
    kept: int

    @property
    def moved(self) -> int:
        return sum(self.received)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--bytes", type=int, default=14, help="bytes of state a parameter")
    parser.add_argument("--bandwidth", type=float, default=25, help="GB/s a rank sends and receives (200 Gbit/s)")
    parser.add_argument("--gather", type=float, help="GB/s of a gather on your device; measured here if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the loads")
    arguments = parser.parse_args()
    started = time.perf_counter()
    layers = decide(arguments.seed)
    decided = time.perf_counter() - started
    plan = Plan(layers={number: layer.plan for number, layer in enumerate(layers)}, criterion="released model")
    removed = parameters_removed(plan)
    assert removed == REMOVED, f"the plan removes {removed} parameters, expected {REMOVED}"
    gather = arguments.gather or measured_gather()
    costs = estimate(layers, gather=gather * 1e9, bandwidth=arguments.bandwidth * 1e9, bytes_each=arguments.bytes)
    balances = [
        statistics.mean(getattr(layer, name) for layer in layers) for name in ("balance_before", "balance_after")
    ]
    columns = ["computed, 824 ranks", "busiest rank", "all ranks"]
    rows = [
        ["experts kept", str(costs["experts_kept_rank"]), f"{costs['experts_kept']:,} of {EXPERTS * len(layers):,}"],
        ["parameters removed", "-", f"{removed:,}"],
        ["surgery, bytes written", _gb(costs["surgery_bytes_rank"]), _gb(costs["surgery_bytes"])],
        ["surgery, seconds", f"{costs['surgery_seconds']:.1f}", "-"],
        ["rearrangement, experts moved", str(costs["experts_moved_rank"]), f"{costs['experts_moved']:,}"],
        ["rearrangement, bytes moved", _gb(costs["moved_bytes_rank"]), _gb(costs["moved_bytes"])],
        ["rearrangement, seconds", f"{costs['rearrangement_seconds']:.1f}", "-"],
    ]
    show("Released model, computed", columns, rows)
    print(f"balance {balances[0]:.3f} -> {balances[1]:.3f}, decided in {decided:.2f} s, gather {gather:.2f} GB/s")
    record: dict[str, Any] = {
        "computed": True,
        "assumptions": (__doc__ or "").split("\n\n")[3].strip().splitlines(),
        "bytes_a_parameter": arguments.bytes,
        "bandwidth_gb_s": arguments.bandwidth,
        "measured_here": {"gather_gb_s": gather if arguments.gather is None else None, "decision_seconds": decided},
        "gather_gb_s": gather,
        "parameters_removed": removed,
        "parameters_an_expert": EXPERT_PARAMETERS,
        "balance_before": balances[0],
        "balance_after": balances[1],
        "worst_over_bound": max(layer.over_bound for layer in layers),
        "costs": costs,
    }
    print(store("laep_scale", {**record, "table": [columns, *rows]}, stored=arguments.store))


def decide(seed: int = 0) -> list[Layer]:
    """The released counts on lognormal loads: drop the least used experts, level the ranks with the others."""
    draw = np.random.default_rng(seed)
    return [_layer(np.round(1e4 * draw.lognormal(size=EXPERTS)).astype(int).tolist(), count) for count in RETAINED]


def _layer(loads: list[int], count: int) -> Layer:
    busiest_first = sorted(range(EXPERTS), key=lambda expert: (-loads[expert], expert))
    kept = sorted(busiest_first[:count])
    kept_loads = [loads[expert] for expert in kept]
    placed = place(kept_loads, RANKS)
    homes = np.array(kept) // (EXPERTS // RANKS)
    ranks = relabel(homes, ranks_of(placed.order, RANKS), RANKS)  # the dropped experts leave uneven ranks behind
    order = order_of(ranks)
    return Layer(
        plan=LayerPlan(experts_before=EXPERTS, order=tuple(kept[new] for new in order)),
        balance_before=balance(rank_loads(kept_loads, range(count), RANKS)),
        balance_after=balance(rank_loads(kept_loads, order, RANKS)),
        over_bound=placed.over_bound,
        received=_count(ranks[ranks != homes]),
        sent=_count(homes[ranks != homes]),
        kept=count,
    )


def _count(ranks: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return tuple(np.bincount(ranks, minlength=RANKS).tolist())


def parameters_removed(plan: Plan) -> int:
    return sum(len(layer.dropped) for layer in plan.layers.values()) * EXPERT_PARAMETERS


def estimate(layers: list[Layer], *, gather: float, bandwidth: float, bytes_each: int) -> dict[str, Any]:
    """Bytes and seconds; `gather` and `bandwidth` in bytes a second."""
    expert = EXPERT_PARAMETERS * bytes_each
    kept = sum(layer.kept for layer in layers)
    share = max(layer.kept for layer in layers) // RANKS
    sent = max(max(layer.sent) for layer in layers)
    wire = max(sent, *(max(layer.received) for layer in layers))
    moved = sum(layer.moved for layer in layers)
    return {
        "bytes_an_expert": expert,
        "experts_kept": kept,
        "experts_kept_rank": share,
        "surgery_bytes": kept * expert,
        "surgery_bytes_rank": share * expert,
        "surgery_seconds": share * expert / gather,
        "experts_moved": moved,
        "experts_moved_rank": wire,
        "moved_bytes": moved * expert,
        "moved_bytes_rank": wire * expert,
        "rearrangement_seconds": sent * expert / gather + wire * expert / bandwidth,
    }


def measured_gather() -> float:
    """GB/s at which the device at hand gathers rows, counting each byte of the result once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.randn(16, 4_000_000, device=device)
    order = torch.randperm(16, device=device)[:12]
    gathered = rows.index_select(0, order)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        torch.index_select(rows, 0, order, out=gathered)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return gathered.numel() * gathered.element_size() / statistics.median(seconds) / 1e9


def _gb(size: float) -> str:
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"


if __name__ == "__main__":
    main()
