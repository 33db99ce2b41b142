"""What LAEP costs and what it gives back, for every preset: tracking, surgery, speed and memory after the pruning.

    python benchmarks/laep_cost.py

Tracking: pairs of blocks of steps, one with and one without the counting hooks, on one model in one process; the
median of the pairs' ratios, with the range of the middle half. On the CPU it is processor time of one thread, since the
wall clock of a shared machine scatters by more than what is measured. Speed: steps before and after one pruning of the
same model and optimizer, same batches. Its result is laep_cost.json.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from record import parser_for, show, store
from secateur import LAEP
from secateur.families import describe_moe
from secateur.pretraining.presets import COMMON, PRESETS

BATCH, LENGTH, VOCABULARY = 8, 256, 2048


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--blocks", type=int, default=30, help="pairs of blocks with and without tracking")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    for name in PRESETS:
        model = build(name).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        results[name] = measure(model, optimizer, arguments.blocks, arguments.steps)
        print(name, results[name], flush=True)
    columns = ["model", "parameters", "tracking", "removed", "tokens/s before", "after", "ratio"]
    columns += ["optimizer MiB", "surgery"]
    rows = [
        [
            name,
            f"{one['parameters_before'] / 1e6:.2f} M",
            f"{one['tracking_ratio']:.3f}x ({_middle_half(one['tracking_ratios'])})",
            f"{one['parameters_removed']:.1%}",
            f"{one['tokens_per_second_before']:,.0f}",
            f"{one['tokens_per_second_after']:,.0f}",
            f"{one['speed_ratio']:.2f}x",
            f"{one['optimizer_bytes_before'] / 2**20:.1f} -> {one['optimizer_bytes_after'] / 2**20:.1f}",
            f"{one['surgery_seconds']:.2f} s",
        ]
        for name, one in results.items()
    ]
    show("Tracking: time of a step with the counting hooks over one without", columns, rows)
    together = pooled([ratio for one in results.values() for ratio in one["tracking_ratios"]])
    print("tracking, all models:", together)
    record = {"batch": BATCH, "sequence_length": LENGTH, "models": results, "tracking_all_models": together}
    print(store("laep_cost", {**record, "table": [columns, *rows]}, stored=arguments.store))


def build(preset: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, _, fields = PRESETS[preset]
    words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**COMMON, **fields, **words})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train()


def measure(model: PreTrainedModel, optimizer: torch.optim.Optimizer, blocks: int, steps: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), device=device)

    def step(pruner: LAEP | None, clock: Callable[[], float] = time.perf_counter) -> float:
        started = clock()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner is not None:
            pruner.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    for _ in range(5):
        step(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    ratios = []
    for block in range(blocks):
        seconds = {}
        for tracked in (block % 2 == 0, block % 2 == 1):  # either first in turn, so that drift cancels
            watcher = LAEP(model, optimizer, prunings=(), window_steps=steps) if tracked else None
            seconds[tracked] = sum(step(watcher, clock) for _ in range(steps))
            if watcher is not None:
                watcher.detach()
        ratios.append(seconds[True] / seconds[False])
    torch.set_num_threads(threads)
    pruner = LAEP(model, optimizer, target_params=0.67, at_step=steps * blocks // 3)
    before = [step(pruner) for _ in range(steps * blocks // 3 - 1)]
    step(pruner)
    after = [step(pruner) for _ in range(steps * blocks // 3)]
    pruner.detach()
    (event,) = pruner.events
    assert describe_moe(model).num_parameters == event.parameters_after
    speed = [BATCH * LENGTH / statistics.median(times) for times in (before, after)]
    return {
        "tracking_ratio": statistics.median(ratios),
        "tracking_ratios": ratios,
        "tokens_per_second_before": speed[0],
        "tokens_per_second_after": speed[1],
        "speed_ratio": speed[1] / speed[0],
        "parameters_before": event.parameters_before,
        "parameters_after": event.parameters_after,
        "parameters_removed": 1 - event.parameters_after / event.parameters_before,
        "optimizer_bytes_before": event.memory_before.optimizer_bytes,
        "optimizer_bytes_after": event.memory_after.optimizer_bytes,
        "parameters_bytes_before": event.memory_before.parameters_bytes,
        "parameters_bytes_after": event.memory_after.parameters_bytes,
        "surgery_seconds": event.surgery_seconds,
        "oracle_max_abs_difference": event.oracle_max_abs_difference,
    }


def pooled(ratios: list[float]) -> dict[str, Any]:
    """Median of all pairs of all models, with its 95 % bootstrap range."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return {
        "pairs": len(ratios),
        "median_ratio": statistics.median(ratios),
        "bootstrap_95": [medians[100], medians[3899]],
    }


def _middle_half(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main()
