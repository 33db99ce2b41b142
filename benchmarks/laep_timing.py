"""What a step of training takes before and after the prunings of laep_tables.py.

    python benchmarks/laep_timing.py --work WORK

For every pruned run of seed 0: its model with fresh weights, and the same cut to the counts the run kept, train in turn
on random tokens in one process of one thread. Process time, so that other work on the machine counts little; the median
of the turns. Writes WORK/step_times.json, which laep_tables.py puts into its result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from laep_grid import SCALES, Setting, grid
from secateur.families import describe_moe
from secateur.plan import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.train.models import make_model, model_config
from secateur.train.options import PretrainOptions

TURNS, STEPS = 9, 3
FILE = "step_times.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.work / FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for one in grid(SCALES[arguments.scale]):
        events = arguments.work / one.folder(0) / "events.json"
        if one.name in found or not events.exists() or not (plans := json.loads(events.read_text())):
            continue
        whole = Plan.from_json(plans[0]["plan"])
        for event in plans[1:]:
            whole = whole.compose(Plan.from_json(event["plan"]))
        found[one.name] = compared(one, {layer: part.experts_after for layer, part in whole.layers.items()})
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(one.name, found[one.name], flush=True)


def compared(one: Setting, counts: dict[int, int]) -> dict[str, float]:
    """Seconds a step of the whole and of the pruned model, and tokens/s of the second over the first."""
    options = PretrainOptions(preset=one.preset, overrides=dict(one.model), vocab_size=2048, sequence_length=128)
    models = [make_model(options, model_config(options, None)) for _ in range(2)]
    moe = describe_moe(models[1])
    layers = {
        layer: LayerPlan(experts_before=moe.counts[layer], order=tuple(range(count))) for layer, count in counts.items()
    }
    prune_model_(moe, Plan(layers=layers, criterion="timing"))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    seconds: list[list[float]] = [[], []]
    for turn in range(TURNS + 1):
        for which, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            begin = time.process_time()
            train(model, optimizer, options, turn)
            seconds[which].append((time.process_time() - begin) / STEPS)
    before, after = (statistics.median(times[1:]) for times in seconds)
    return {"seconds_before": before, "seconds_after": after, "speed": before / after}


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, options: PretrainOptions, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        tokens = torch.randint(0, 2048, (options.batch_size, options.sequence_length), generator=draw)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
