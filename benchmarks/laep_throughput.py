"""What pruning and rearrangement give in tokens/s on expert-parallel ranks, against the base and two balance losses.

    torchrun --nproc-per-node 2 benchmarks/laep_throughput.py --config small-batch

One job: a base model and two with an auxiliary loss are trained for --steps on real text; two copies of the base are
pruned by the loads of that training, one keeps the order of its experts, the other has them levelled over the ranks.
Then all five train on the same batches in turn, block by block; a ratio is of two blocks of one round. Results of all
configurations and numbers of ranks are kept together in laep_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from record import parser_for, results_in, show, store
from secateur import LAEP
from secateur.data.prepare import load_prepared, prepare, save_prepared
from secateur.families import describe_moe
from secateur.observation.loads import LoadCounter
from secateur.placement import balance, rank_loads
from secateur.pretraining.models import load_model
from secateur.train.balance import attach_balance
from secateur.train.distributed import launch
from secateur.train.distributed.load import ParallelSizes, parallel_sizes
from secateur.train.distributed.ranks import Ranks
from secateur.train.distributed.save import save_for_ranks, save_sharded

# name -> (sequences a step over all ranks, tokens a sequence, fields of a Qwen3-MoE config)
MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 256,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "small-batch": (8, 64, MODEL),
    "middle-batch": (8, 256, MODEL),
    "large-batch": (32, 256, MODEL),
    "many-experts": (8, 256, {**MODEL, "num_experts": 128, "moe_intermediate_size": 128}),
    "weight-bound": (4, 64, {**MODEL, "hidden_size": 512, "num_hidden_layers": 2, "moe_intermediate_size": 512}),
    "wide-experts": (8, 128, {**MODEL, "num_experts": 32, "moe_intermediate_size": 768}),
}
VOCABULARY = 2048
LOSSES = ("mixtral", "deepseek_v3")
WINDOW = 10
COLUMNS = ["configuration", "ranks", "run", "parameters", "busiest rank / mean", "tokens/s", "over base"]


@dataclass
class Run:
    """A model in training. seconds: of each block of steps."""

    name: str
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    seconds: list[float]
    balance: Any = None

    def step(self, tokens: Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        if self.balance is not None:
            self.balance.after_optimizer_step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--config", choices=CONFIGS, required=True)
    parser.add_argument("--data", nargs="*", default=(), help="text; default: this Python's standard library")
    parser.add_argument("--steps", type=int, default=200, help="training steps before the pruning")
    parser.add_argument("--rounds", type=int, default=20, help="blocks a run is measured for")
    parser.add_argument("--block-steps", type=int, default=3)
    parser.add_argument("--target-params", type=float, default=0.6)
    arguments = parser.parse_args()
    launch.join()
    sizes = parallel_sizes(None, max(1, launch.world_size()), 1)
    shared = launch.once(lambda: tempfile.mkdtemp(prefix="throughput-"))
    batches = data_of(arguments, Path(shared), sizes)
    runs = trained(arguments, Path(shared), sizes, batches)
    measured = measure(arguments, runs, batches)
    launch.barrier()
    if launch.is_main():
        report(arguments, sizes, measured)
    launch.leave()


def data_of(arguments: argparse.Namespace, shared: Path, sizes: ParallelSizes) -> Iterator[Tensor]:
    """This rank's part of one global batch after another, for ever."""
    sequences, length, _ = CONFIGS[arguments.config]
    if launch.is_main():
        data = prepare(
            tuple(arguments.data), vocab_size=VOCABULARY, sequence_length=length, max_bytes=8_000_000, seed=0
        )
        save_prepared(data, shared / "data")
    launch.barrier()
    blocks = load_prepared(shared / "data").train.blocks.long()
    if torch.cuda.is_available():
        blocks = blocks.cuda()
    draw = torch.Generator().manual_seed(0)
    share = sequences // sizes.fsdp
    first = launch.rank() * share
    while True:
        order = torch.randperm(len(blocks), generator=draw)
        for start in range(0, len(order) - sequences + 1, sequences):
            yield blocks[order[start + first : start + first + share]]


def trained(arguments: argparse.Namespace, shared: Path, sizes: ParallelSizes, batches: Iterator[Tensor]) -> list[Run]:
    """The base, its two pruned copies, and the runs with a balance loss, after the same steps from the same weights."""
    start = shared / "start"
    if launch.is_main():
        set_seed(0)
        words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        config = AutoConfig.for_model("qwen3_moe", **CONFIGS[arguments.config][2], **words)
        save_for_ranks(AutoModelForCausalLM.from_config(config, dtype=torch.float32), start)
    launch.barrier()
    base = begin("base", start, sizes)
    others = [begin(f"{loss} loss", start, sizes, loss) for loss in LOSSES]
    for step in range(arguments.steps):
        tokens = next(batches)
        for run in (base, *others):
            run.step(tokens)
        if launch.is_main() and step % 20 == 0:
            print(f"trained {step}/{arguments.steps}", flush=True)
    save_sharded(base.model, shared / "trained")
    pruned = [begin(name, shared / "trained", sizes) for name in ("pruned", "pruned + rearranged")]
    for run, rearrange in zip(pruned, (False, None), strict=True):
        prune(run, batches, arguments.target_params, rearrange)
    return [base, *pruned, *others]


def begin(name: str, folder: Path, sizes: ParallelSizes, loss: str = "none") -> Run:
    model = load_model(folder, sizes).train()
    if torch.cuda.is_available():
        model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    moe = describe_moe(model)
    balance = attach_balance(model, loss, blocks=moe.blocks, model_type="qwen3_moe", sum_counts=Ranks(model).sum_counts)
    return Run(name=name, model=model, optimizer=optimizer, seconds=[], balance=balance)


def prune(run: Run, batches: Iterator[Tensor], target: float, rearrange: bool | None) -> None:
    """Count loads for one window, then prune."""
    pruner = LAEP(
        run.model, run.optimizer, at_step=WINDOW, window_steps=WINDOW, target_params=target, rearrange=rearrange
    )
    for _ in range(WINDOW):
        run.step(next(batches))
        event = pruner.step()
    pruner.detach()
    assert event is not None
    if launch.is_main():
        print(run.name, event.describe(), flush=True)


def measure(arguments: argparse.Namespace, runs: list[Run], batches: Iterator[Tensor]) -> list[dict[str, Any]]:
    """Every run in turn on the same batches; then, not timed, the balance of what each routes."""
    turns = random.Random(0)
    for warm in (True, False):
        for _ in range(1 if warm else arguments.rounds):
            block = [next(batches) for _ in range(arguments.block_steps)]
            order = list(runs)
            turns.shuffle(order)
            for run in order:
                wait()
                started = time.perf_counter()
                for tokens in block:
                    run.step(tokens)
                wait()
                if not warm:
                    run.seconds.append(time.perf_counter() - started)
    sequences, length, _ = CONFIGS[arguments.config]
    tokens = sequences * length * arguments.block_steps
    block = [next(batches) for _ in range(WINDOW)]
    return [
        {
            "run": run.name,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "tokens_per_second": tokens / statistics.median(run.seconds),
            "seconds_per_block": run.seconds,
            "busiest_rank_over_mean": rank_balance(run, block),
            "share_of_step_in_optimizer": optimizer_share(run, block[0]),
        }
        for run in runs
    ]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    launch.barrier()


def rank_balance(run: Run, block: list[Tensor]) -> float | None:
    """The busiest rank over the mean, averaged over layers; None on one rank."""
    ranks = Ranks(run.model)
    moe = describe_moe(run.model)
    counter = LoadCounter(moe)
    for tokens in block:
        run.model(input_ids=tokens, labels=tokens)
    stats = ranks.sum(counter.read(), next(run.model.parameters()).device)
    counter.detach()
    if ranks.size == 1:
        return None
    layers = [balance(rank_loads(load, range(len(load)), ranks.size)) for load in stats.loads().values()]
    return statistics.mean(layers)


def optimizer_share(run: Run, tokens: Tensor) -> float:
    """The part of a step that `optimizer.step()` takes, on this rank."""
    times = []
    for _ in range(5):
        wait()
        started = time.perf_counter()
        run.model(input_ids=tokens, labels=tokens).loss.backward()
        wait()
        middle = time.perf_counter()
        run.optimizer.step()
        wait()
        times.append((time.perf_counter() - middle) / (time.perf_counter() - started))
        run.optimizer.zero_grad()
    return statistics.median(times)


def report(arguments: argparse.Namespace, sizes: ParallelSizes, measured: list[dict[str, Any]]) -> None:
    """Put this job's rows among those stored, print them all."""
    base = measured[0]
    for one in measured:
        ratios = [b / o for b, o in zip(base["seconds_per_block"], one["seconds_per_block"], strict=True)]
        one |= {"over_base": statistics.median(ratios), "over_base_range": middle_95(ratios)}
    pruned, rearranged = measured[1], measured[2]
    job = {
        "config": arguments.config,
        "ranks": launch.world_size(),
        "sequences_a_step": CONFIGS[arguments.config][0],
        "tokens_a_sequence": CONFIGS[arguments.config][1],
        "model": CONFIGS[arguments.config][2],
        "steps_before_pruning": arguments.steps,
        "parameters_removed": 1 - pruned["parameters"] / base["parameters"],
        "gain_of_pruning": pruned["over_base"] - 1,
        "gain_of_rearrangement": rearranged["over_base"] - pruned["over_base"],
        "gain": rearranged["over_base"] - 1,
        "runs": measured,
    }
    path = results_in(arguments.store) / "laep_throughput.json"
    jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
    key = (job["config"], job["ranks"])
    jobs = sorted(
        [one for one in jobs if (one["config"], one["ranks"]) != key] + [job],
        key=lambda one: (list(CONFIGS).index(one["config"]), one["ranks"]),
    )
    rows = [row for one in jobs for row in rows_of(one)]
    show("LAEP on expert-parallel ranks", COLUMNS, rows)
    print(
        f"removed {job['parameters_removed']:.1%}: {job['gain_of_pruning']:+.1%} by pruning, "
        f"{job['gain_of_rearrangement']:+.1%} by rearrangement"
    )
    print(store("laep_throughput", {"jobs": jobs, "table": [COLUMNS, *rows]}, stored=arguments.store))


def rows_of(job: dict[str, Any]) -> list[list[str]]:
    return [
        [
            job["config"],
            str(job["ranks"]),
            one["run"],
            f"{one['parameters'] / 1e6:.1f} M",
            "-" if one["busiest_rank_over_mean"] is None else f"{one['busiest_rank_over_mean']:.2f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['over_base']:.3f}x ({one['over_base_range'][0]:.2f} to {one['over_base_range'][1]:.2f})",
        ]
        for one in job["runs"]
    ]


def middle_95(ratios: list[float]) -> list[float]:
    """95 % bootstrap range of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return [medians[100], medians[3899]]


if __name__ == "__main__":
    main()
