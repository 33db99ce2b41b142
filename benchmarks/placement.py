"""Balance and time of the placements, against DeepSeek's EPLB, plain orders and the exact optimum.

    curl -O https://raw.githubusercontent.com/deepseek-ai/EPLB/main/eplb.py
    python benchmarks/placement.py --eplb eplb.py

EPLB runs from its own file, with as many replicas as experts (pure placement). Both sides get the same table of all
layers, in turns, on one thread; a ratio is that of one pair, and the median of the pairs counts. Balance is the
busiest rank over the mean. The optimum of a layer is known to 0.5 % where the order found is that near to the lower
bound, and exactly where greedy is (up to two experts a rank) or where the integer programme proves it in time. Real
loads are those of our pre-training runs, stored in data/loads.json, or with `--runs` those of other runs. Its result is
placement.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from record import parser_for, results_in, show, store
from secateur.placement import busiest_rank_lower_bound, exact, greedy_with_room, level_ranks

EXPERTS = (16, 32, 64, 128, 256, 512)
RANKS = (2, 4, 8, 16, 32, 64)
LOADS = Path(__file__).parent / "data" / "loads.json"
WITHIN = 1.005  # of the optimum: the goal

Table = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Find = Callable[[Table, int], Table]


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--eplb", type=Path, required=True, help="eplb.py of github.com/deepseek-ai/EPLB")
    parser.add_argument("--runs", type=Path, nargs="+", help="run folders whose loads become the real loads")
    parser.add_argument("--layers", type=int, default=58, help="layers of a table; 58 is DeepSeek-V3")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs a size")
    parser.add_argument("--exact-layers", type=int, default=8, help="at most this many integer programmes a size")
    parser.add_argument("--exact-seconds", type=float, default=10, help="time limit of one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loads = keep_loads(arguments.runs, arguments.store) if arguments.runs else LOADS
    eplb = load_eplb(arguments.eplb)
    sizes = []
    for name, num_experts, table in tables(arguments.layers, loads):
        for num_ranks in (ranks for ranks in RANKS if ranks <= num_experts):
            one = {"loads": name, "experts": num_experts, "ranks": num_ranks, "layers": len(table)}
            one |= measure(table, num_ranks, eplb, arguments)
            print(json.dumps(one), flush=True)
            sizes.append(one)
    columns = ["loads", "experts", "contiguous", "random", "greedy", "EPLB", "swaps", "bound", "worse than EPLB"]
    columns += ["known", "over 0.5 %", "EPLB time / ours", "one layer"]
    rows = [row(group) for group in grouped(sizes)]
    show("Busiest rank over the mean; mean of the sizes from 2 ranks on", columns, rows)
    eplb_hash = hashlib.sha256(arguments.eplb.read_bytes()).hexdigest()
    print(
        store(
            "placement", {"eplb_sha256": eplb_hash, "sizes": sizes, "table": [columns, *rows]}, stored=arguments.store
        )
    )


def load_eplb(path: Path) -> Find:
    spec = importlib.util.spec_from_file_location("eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def find(table: Table, num_ranks: int) -> Table:
        physical_to_logical, _, _ = module.rebalance_experts(
            torch.from_numpy(table), table.shape[1], num_groups=1, num_nodes=1, num_gpus=num_ranks
        )
        order: Table = physical_to_logical.numpy()
        return order

    return find


def keep_loads(runs: list[Path], stored: bool) -> Path:
    """Store four windows of each run, spread over its length: {experts: [[loads of a layer], ...]}."""
    kept: dict[str, list[list[float]]] = {}
    for run in runs:
        windows = (run / "loads.jsonl").read_text().splitlines()
        for quarter in range(1, 5):
            for loads in json.loads(windows[len(windows) * quarter // 4 - 1])["layers"].values():
                kept.setdefault(str(len(loads)), []).append(loads)
    path = LOADS if stored else results_in(stored) / LOADS.name
    path.write_text(json.dumps(kept) + "\n")
    return path


def tables(num_layers: int, loads: Path) -> list[tuple[str, int, Table]]:
    """Law, experts, (layers, experts) whole tokens."""
    found = []
    for name, law in (("lognormal", lognormal), ("zipf", zipf)):
        for num_experts in EXPERTS:
            draw = np.random.default_rng(num_experts)
            found.append((name, num_experts, np.stack([law(draw, num_experts) for _ in range(num_layers)])))
    for count, layers in json.loads(loads.read_text()).items():
        found.append(("our runs", int(count), np.asarray(layers, dtype=np.float64)))
    return found


def lognormal(draw: np.random.Generator, num_experts: int) -> Table:
    return np.round(1000 * draw.lognormal(size=num_experts))


def zipf(draw: np.random.Generator, num_experts: int) -> Table:
    """The i-th busiest expert gets 1 / i ** s of the tokens; s from 0.4 to 1.2, another one each layer."""
    return np.round(100_000 * draw.permutation(np.arange(1, num_experts + 1) ** -draw.uniform(0.4, 1.2)))


def measure(table: Table, num_ranks: int, eplb: Find, arguments: argparse.Namespace) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    num_layers, num_experts = table.shape
    orders = {
        "contiguous": np.tile(np.arange(num_experts), (num_layers, 1)),
        "random": draw.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1),
        "greedy": np.array([greedy_with_room(layer, num_ranks) for layer in table.tolist()]),
        "eplb": eplb(table, num_ranks),
        "swaps": level_ranks(table, num_ranks),
    }
    busiest = {name: busiest_ranks(table, order, num_ranks) for name, order in orders.items()}
    mean = table.sum(axis=1) / num_ranks
    bound = np.array([busiest_rank_lower_bound(layer, num_ranks) for layer in table.tolist()])
    return {
        "balance": {name: float((loads / mean).mean()) for name, loads in busiest.items()},
        "bound": float((bound / mean).mean()),
        "layers_worse_than_eplb": int((busiest["swaps"] > busiest["eplb"]).sum()),
        "layers_better_than_eplb": int((busiest["swaps"] < busiest["eplb"]).sum()),
        **against_optimum(table, num_ranks, busiest["swaps"], bound, arguments),
        "all_layers": timed(lambda find: find(table, num_ranks), eplb, arguments.pairs, num_layers),
        "one_layer": timed(
            lambda find: [find(table[layer : layer + 1], num_ranks) for layer in range(min(4, num_layers))],
            eplb,
            arguments.pairs,
            min(4, num_layers),
        ),
    }


def busiest_ranks(table: Table, order: Table, num_ranks: int) -> Table:
    """(layers,) the load of the busiest rank."""
    held = np.take_along_axis(table, order, axis=1)
    busiest: Table = held.reshape(len(table), num_ranks, -1).sum(axis=2).max(axis=1)
    return busiest


def against_optimum(
    table: Table, num_ranks: int, reached: Table, bound: Table, arguments: argparse.Namespace
) -> dict[str, Any]:
    """How many layers have a known optimum, how, and how far above it the order found is."""
    if table.shape[1] <= 2 * num_ranks:
        return {"known_by_bound": 0, "known_exactly": len(table), "not_known": 0, "over": 0, "worst_ratio": 1.0}
    near = reached <= WITHIN * bound
    ratios = []
    for layer in np.flatnonzero(~near)[: arguments.exact_layers]:
        solved = exact(table[layer].tolist(), num_ranks, arguments.exact_seconds)
        optimum = busiest_ranks(table[layer : layer + 1], np.array([solved.order]), num_ranks)[0]
        if solved.lower_bound == optimum:
            ratios.append(float(reached[layer] / optimum))
    worst_near = float((reached[near] / bound[near]).max()) if near.any() else 1.0
    return {
        "known_by_bound": int(near.sum()),
        "known_exactly": len(ratios),
        "not_known": int((~near).sum()) - len(ratios),
        "over": sum(ratio > WITHIN for ratio in ratios),
        "worst_ratio": max([worst_near, *ratios]),
    }


def timed(work: Callable[[Find], object], eplb: Find, pairs: int, num_layers: int) -> dict[str, Any]:
    """Microseconds a layer, and EPLB's time over ours: the median of pairs with either first in turn."""
    finds = {"eplb": eplb, "ours": level_ranks}
    for find in finds.values():
        work(find)
    seconds: dict[str, list[float]] = {name: [] for name in finds}
    for pair in range(pairs):
        for name in list(finds) if pair % 2 else reversed(finds):
            started = time.perf_counter()
            work(finds[name])
            seconds[name].append(time.perf_counter() - started)
    ratios = [theirs / ours for theirs, ours in zip(seconds["eplb"], seconds["ours"], strict=True)]
    micros = {f"{name}_us_a_layer": statistics.median(times) * 1e6 / num_layers for name, times in seconds.items()}
    return {**micros, "eplb_over_ours": statistics.median(ratios)}


def grouped(sizes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in sizes:
        groups.setdefault((one["loads"], one["experts"]), []).append(one)
    return list(groups.values())


def row(group: list[dict[str, Any]]) -> list[str]:
    balances = [
        f"{statistics.mean(one['balance'][name] for one in group):.4f}"
        for name in ("contiguous", "random", "greedy", "eplb", "swaps")
    ]
    known = sum(one["known_by_bound"] + one["known_exactly"] for one in group)
    layers = sum(one["layers"] for one in group)
    times = [
        f"{min(ratios):.1f} to {max(ratios):.0f}"
        for ratios in ([one[key]["eplb_over_ours"] for one in group] for key in ("all_layers", "one_layer"))
    ]
    return [
        group[0]["loads"],
        str(group[0]["experts"]),
        *balances,
        f"{statistics.mean(one['bound'] for one in group):.4f}",
        f"{sum(one['layers_worse_than_eplb'] for one in group)} of {layers}",
        f"{known} of {layers}",
        str(sum(one["over"] for one in group)),
        *times,
    ]


if __name__ == "__main__":
    main()
