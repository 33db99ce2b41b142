"""What a step of training takes in the runs of laep_tables.py, before and after every pruning.

    python benchmarks/laep_timing.py --work WORK

For every setting with a run of seed 0: its model with fresh weights and without balancing, the same balanced if the
setting is, and the same cut to the counts that each pruning of that run left, train in turn on random tokens in one
process. On a CPU process time of one thread, so that other work on the machine counts little. Fresh routers send tokens
to every expert, trained ones leave some idle. Writes WORK/SCALE/step_times.json, which laep_tables.py puts into its
result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from laep_grid import SCALES, Scale, Setting, grid
from laep_tables import STEP_TIMES
from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.pretraining.models import make_model, model_config
from secateur.pretraining.options import PretrainOptions
from secateur.surgery.module import prune_model_
from secateur.train.balance import attach_balance

TURNS, STEPS = 15, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what of a command line the time of a step depends on
OPTIONS: dict[str, Callable[[str], Any]] = {
    "--balance": str,
    "--balance-strength": float,
    "--sequence-length": int,
    "--vocab-size": int,
    "--batch-size": int,
    "--precision": str,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scale, work = SCALES[arguments.scale], arguments.work / arguments.scale
    path = work / STEP_TIMES
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for one in grid(scale):
        events = work / one.folder(0) / "events.json"
        if not events.exists():
            continue
        counts = counts_after(json.loads(events.read_text()))
        about = {"setting": one.told(), "counts": [[*one.values()] for one in counts]}
        if found.get(one.name, {}).items() >= about.items():
            continue
        options = options_of(one, scale)
        seconds = step_seconds(options, counts)
        tokens = options.batch_size * options.sequence_length
        found[one.name] = {**about, "tokens_a_step": tokens, "seconds": seconds}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(one.name, [round(tokens / one) for one in seconds], flush=True)


def counts_after(events: list[dict[str, Any]]) -> list[dict[int, int]]:
    """{layer: experts} after each pruning of a run."""
    plans = itertools.accumulate((Plan.from_json(event["plan"]) for event in events), Plan.compose)
    return [{layer: part.experts_after for layer, part in plan.layers.items()} for plan in plans]


def options_of(one: Setting, scale: Scale) -> PretrainOptions:
    words = [*scale.options, *one.options]
    given = {
        word.removeprefix("--").replace("-", "_"): OPTIONS[word](value)
        for word, value in itertools.pairwise(words)
        if word in OPTIONS
    }
    return PretrainOptions(preset=one.preset, overrides=dict(one.model), **given)


def step_seconds(options: PretrainOptions, counts: list[dict[int, int]]) -> list[float]:
    """Of the whole model without balancing, of the balanced one if it is, and of each that `counts` tells."""
    plain = replace(options, balance="none", balance_strength=None)
    balanced = [Trained(options, {})] if options.balance != "none" else []
    trained = [Trained(plain, {}), *balanced, *(Trained(options, one) for one in counts)]
    seconds: list[list[float]] = [[] for _ in trained]
    for turn in range(TURNS + 1):
        for which, one in enumerate(trained):
            seconds[which].append(one.seconds(turn))
    return of_turns([times[1:] for times in seconds])


def of_turns(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of the first the median; of each other that times the median ratio in one turn, as a machine's speed drifts."""
    whole = statistics.median(seconds[0])
    return [
        whole * statistics.median(one / first for one, first in zip(times, seconds[0], strict=True))
        for times in seconds
    ]


class Trained:
    """A model with its optimizer and its balance."""

    def __init__(self, options: PretrainOptions, counts: dict[int, int]) -> None:
        self.options = options
        self.model: PreTrainedModel = make_model(options.settings.model, model_config(options.settings.model, None)).to(
            DEVICE
        )
        moe = describe_moe(self.model)
        if counts:
            layers = {
                layer: LayerPlan(experts_before=moe.counts[layer], order=tuple(range(count)))
                for layer, count in counts.items()
            }
            prune_model_(moe, Plan(layers=layers, criterion="timing"))
        self.balance = attach_balance(
            self.model, options.balance, blocks=moe.blocks, model_type=moe.model_type, **options.balance_arguments()
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def seconds(self, seed: int) -> float:
        """Of one of STEPS steps."""
        begin = now()
        draw = torch.Generator().manual_seed(seed)
        size = (self.options.batch_size, self.options.sequence_length)
        for _ in range(STEPS):
            tokens = torch.randint(0, self.options.vocab_size, size, generator=draw).to(DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.options.precision == "bf16"):
                loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
            self.optimizer.step()
            self.balance.after_optimizer_step()
            self.optimizer.zero_grad()
        return (now() - begin) / STEPS


def now() -> float:
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
