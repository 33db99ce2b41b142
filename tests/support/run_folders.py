"""Run folders as `secateur pretrain` writes them, made up: what the tests of the report read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from secateur.plans import LayerPlan, Plan

STEP_TOKENS = 2048


def make_run(
    folder: Path,
    *,
    prunings: tuple[int, ...] = (300,),
    control: bool = True,
    finished: bool = True,
    num_layers: int = 4,
    num_experts: int = 16,
    steps: int = 600,
    multiple_of: int = 4,
    seed: int = 0,
) -> Path:
    """A run folder as `secateur pretrain` writes it, with lognormal loads that settle early."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    current = {layer: tuple(range(num_experts)) for layer in range(num_layers)}
    parameters = 1_000_000 + 40_000 * num_layers * num_experts
    goal = {layer: [draw.lognormvariate(0, 1.1) for _ in range(num_experts)] for layer in current}
    start = {layer: [draw.lognormvariate(0, 1.3) for _ in range(num_experts)] for layer in current}
    write_json(folder / "run.json", run_json(parameters, dict.fromkeys(current, num_experts)))
    metrics: list[Any] = []
    loads: list[Any] = []
    events: list[Any] = []
    for step in range(20, steps + 1, 20):
        settle = math.exp(-step / 60)
        counts = {
            layer: _counts([goal[layer][i] ** (1 - settle) * start[layer][i] ** settle for i in ids], draw)
            for layer, ids in current.items()
        }
        loads.append({"step": step, "tokens": step * STEP_TOKENS, "layers": {str(k): v for k, v in counts.items()}})
        metrics += _metrics(step, draw, speed=16000 + 3200 * len(events), shift=0.02 * len(events))
        if step in prunings:
            event, current, parameters = _prune(step, counts, current, parameters, multiple_of)
            events.append(event)
    end = metrics[-1]
    write_json(folder / "events.json", events)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loads))
    if finished:
        write_json(folder / "summary.json", summary_json(steps, end, parameters, after=19150.0 if events else None))
    if control:
        make_run(
            folder / "control",
            prunings=(),
            control=False,
            finished=finished,
            num_layers=num_layers,
            num_experts=num_experts,
            steps=steps,
            seed=seed,
        )
    return folder


def run_json(parameters: int, experts: dict[int, int]) -> dict[str, Any]:
    return {
        "secateur": "0.1.0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "hardware": {"cpu": "Some <fast> CPU & more", "cores": 2, "gpu": None},
        "command": ["secateur", "pretrain", "--name", "<script>alert(1)</script>"],
        "config": {"alpha": 0.4, "beta": 0.1},
        "model": {
            "model_type": "qwen3_moe",
            "attention": "grouped-query",
            "parameters": parameters,
            "layers": len(experts),
            "top_k": 2,
            "experts": {str(layer): count for layer, count in experts.items()},
        },
        "data": {"domains": {"code": {"train_tokens": 10, "validation_tokens": 2, "documents": 3}}},
    }


def summary_json(steps: int, end: dict[str, Any], parameters: int, after: float | None) -> dict[str, Any]:
    return {
        "finished": True,
        "validation_loss": end["validation_loss"],
        "validation_loss_by_domain": end["validation_loss_by_domain"],
        "tokens_per_second": {"before": 16040.0, "after": after},
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "seconds": 75.0,
        "parameters": parameters,
        "peak_memory_bytes": 900 * 2**20,
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _counts(weights: list[float], draw: random.Random) -> list[int]:
    total = sum(weights)
    return [round(20 * STEP_TOKENS * 2 * weight / total * draw.uniform(0.93, 1.07)) for weight in weights]


def _metrics(step: int, draw: random.Random, speed: float, shift: float) -> list[dict[str, Any]]:
    loss = 3.4 + 5.5 * math.exp(-step / 130) + shift
    head = {"step": step, "tokens": step * STEP_TOKENS, "seconds": step / 8}
    train = {
        "kind": "train",
        **head,
        "loss": loss + draw.gauss(0, 0.05),
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": speed * draw.uniform(0.97, 1.03),
        "phase": "transition" if step < 200 else "stable",
        "load_max_over_mean": 4.0,
        "parameters": 1,
    }
    if step % 100:
        return [train]
    domains = {"code": loss - 0.3, "prose": loss + 0.5}
    return [train, {"kind": "eval", **head, "validation_loss": loss + 0.1, "validation_loss_by_domain": domains}]


def _prune(
    step: int, counts: dict[int, list[int]], current: dict[int, tuple[int, ...]], parameters: int, multiple_of: int
) -> tuple[dict[str, Any], dict[int, tuple[int, ...]], int]:
    layers = {}
    for layer, loads in counts.items():
        idlest = sorted(range(len(loads)), key=lambda i: (loads[i], -i))
        sums = [sum(loads[i] for i in idlest[: n + 1]) for n in range(len(idlest))]
        may_go = sum(
            loads[i] <= 0.4 * sum(loads) / len(loads) and total < 0.1 * sum(loads)
            for i, total in zip(idlest, sums, strict=True)
        )
        kept = -(-(len(loads) - may_go) // multiple_of) * multiple_of
        layers[layer] = LayerPlan(experts_before=len(loads), order=tuple(sorted(idlest[len(loads) - kept :])))
    plan = Plan(layers=layers, criterion="laep", details={"alpha": 0.4, "beta": 0.1})
    before = sum(map(len, current.values()))
    after = sum(entry.experts_after for entry in layers.values())
    left = parameters - 40_000 * (before - after)
    gone = sum(counts[layer][i] for layer, entry in layers.items() for i in entry.dropped)
    event = {
        "step": step,
        "tokens": step * STEP_TOKENS,
        "reason": "stable",
        "plan": plan.to_json(),
        "loads": {str(layer): loads for layer, loads in counts.items()},
        "layers": {
            str(layer): {
                "experts_before": entry.experts_before,
                "experts_after": entry.experts_after,
                "dropped": list(entry.dropped),
                "rerouted_share": sum(counts[layer][i] for i in entry.dropped) / sum(counts[layer]),
            }
            for layer, entry in layers.items()
        },
        "parameters_before": parameters,
        "parameters_after": left,
        "experts_before": before,
        "experts_after": after,
        "rerouted_share": gone / sum(map(sum, counts.values())),
        "memory_before": {"parameters_bytes": 4 * parameters, "optimizer_bytes": 8 * parameters},
        "memory_after": {"parameters_bytes": 4 * left, "optimizer_bytes": 8 * left},
        "alpha": 0.4,
        "beta": 0.1,
        "surgery_seconds": 0.021,
        "oracle_max_abs_difference": 0.0,
    }
    later = {layer: tuple(current[layer][old] for old in entry.order) for layer, entry in layers.items()}
    return event, later, left


def tiny_run(folder: Path, loads: list[list[int]], **files: Any) -> Path:
    """A run folder with one window of loads, one list a layer, and files by name without ending."""
    folder.mkdir()
    layers = {str(layer): load for layer, load in enumerate(loads)}
    write_json(folder / "run.json", run_json(1000, {layer: len(load) for layer, load in enumerate(loads)}))
    (folder / "loads.jsonl").write_text(json.dumps({"step": 10, "tokens": 100, "layers": layers}) + "\n")
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def two_events() -> list[dict[str, Any]]:
    """8 experts; 0, 2 and 5 go and the rest turns round, then 1 of those 5 goes."""
    steps = ((20, 8, (7, 6, 4, 3, 1), [1, 9, 2, 8, 7, 3, 6, 5]), (40, 5, (0, 1, 3, 4), [5, 6, 1, 8, 9]))
    events = []
    for step, size, order, loads in steps:
        plan = Plan(layers={0: LayerPlan(experts_before=size, order=order)}, criterion="laep")
        memory = {"parameters_bytes": 10, "optimizer_bytes": 20}
        dropped = [old for old in range(size) if old not in order]
        counts = {"experts_before": size, "experts_after": len(order)}
        layer = counts | {"dropped": dropped, "rerouted_share": sum(loads[old] for old in dropped) / sum(loads)}
        events.append(
            {"step": step, "tokens": 10 * step, "reason": "step", "plan": plan.to_json(), "loads": {"0": loads}}
            | counts
            | {"parameters_before": 100 * size, "parameters_after": 100 * len(order), "layers": {"0": layer}}
            | {"memory_before": memory, "memory_after": memory, "rerouted_share": layer["rerouted_share"]}
            | {"alpha": None, "beta": "inf", "surgery_seconds": 0.5, "oracle_max_abs_difference": None}
        )
    return events


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()
