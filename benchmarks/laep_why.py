"""Why LAEP costs what it costs: loads, ranks and router entropy by depth, and what tokens lose with their expert.

    python benchmarks/fetch_text.py TEXT && python benchmarks/laep_why.py TEXT --work WORK

For each seed two runs of a deep, narrow model that are the same up to the pruning: one goes on whole, one pruned. Every
20 steps: the tokens of each expert, and the entropy of the router, as a share of the largest possible. At the pruning
and some steps after it: the loss of every token of a fixed validation text in both runs. A token has lost an expert if
a layer of the whole model sends it to one that is dropped. Its result is laep_why.json; laep_evidence.py draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from laep_quality import write_code
from record import parser_for, store
from secateur.data.packing import BlockDataset
from secateur.data.prepare import PreparedData, load_prepared, prepare, save_prepared
from secateur.families import MoEModel
from secateur.observation.call import read_index
from secateur.pretraining.models import make_model, model_config
from secateur.pretraining.options import PretrainOptions
from secateur.train.laep import LAEP

DOMAINS = ("code", "manuals", "dictionary", "speeches")
OPTIONS = PretrainOptions(
    preset="qwen3_moe",
    overrides={"hidden_size": 48, "moe_intermediate_size": 48, "head_dim": 12, "num_hidden_layers": 12},
    vocab_size=2048,
    sequence_length=128,
    batch_size=8,
)
WINDOW = 20
BLOCKS = 96  # validation sequences
AFTER = (0, 1, 5, 10, 20, 50, 100, 200, 400)  # steps after the pruning
FREQUENCY_BINS = 5


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--prune-at", type=int, default=400)
    parser.add_argument("--target", type=float, default=0.75)
    arguments = parser.parse_args()
    if arguments.prune_at % WINDOW or not 0 < arguments.prune_at < arguments.steps:
        parser.error(f"--prune-at {arguments.prune_at}: expected a multiple of {WINDOW} before --steps")
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_code(arguments.text)
    settings = {name: getattr(arguments, name) for name in ("steps", "prune_at", "target")}
    found = []
    for seed in range(arguments.seeds):
        path = arguments.work / f"why-seed{seed}-{arguments.steps}-{arguments.prune_at}-{arguments.target}.json"
        if not path.exists():
            path.write_text(json.dumps(one_seed(arguments, seed), allow_nan=False))
        found.append(without_loads(json.loads(path.read_text())))
        print(f"seed {seed}: {path}", flush=True)
    about = {"settings": settings, "model": dict(OPTIONS.overrides), "domains": list(DOMAINS)}
    print(store("laep_why", {**about, "runs": found}, stored=arguments.store))


def without_loads(run: dict[str, Any]) -> dict[str, Any]:
    """Of every window the busiest expert over the mean of its layer, in place of all loads."""
    return run | {
        name: [
            {key: value for key, value in window.items() if key != "loads"}
            | {"busiest": {layer: max(loads) / statistics.fmean(loads) for layer, loads in window["loads"].items()}}
            for window in run[name]
        ]
        for name in ("windows", "windows_pruned")
    }


def one_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    data = tokens(arguments, seed)
    whole = Training(arguments, data, seed, prune=False)
    pruned = Training(arguments, data, seed, prune=True)
    whole.run()
    pruned.run()
    assert whole.losses[-1].equal(pruned.losses[-1]), "the runs differ before the pruning"
    plan = pruned.laep.events[0].plan
    lost = torch.zeros_like(whole.losses[-1], dtype=torch.bool)
    by_layer = {}
    for layer, one in plan.layers.items():
        gone = torch.isin(whole.routed[layer], torch.tensor(one.dropped)).any(dim=1)
        by_layer[str(layer)] = float(gone.float().mean())
        lost |= gone.view(-1, whole.validation.shape[1])[:, :-1].reshape(-1)
    return {
        "windows": whole.windows,
        "windows_pruned": pruned.windows,
        "kept": {str(layer): one.experts_after for layer, one in plan.layers.items()},
        "experts": next(iter(plan.layers.values())).experts_before,
        "tokens": len(lost),
        "tokens_that_lost": float(lost.float().mean()),
        "tokens_that_lost_by_layer": by_layer,
        "loss_of_tokens": {
            str(after): {
                name: {
                    "whole": float(whole.losses[after][mask].mean()),
                    "pruned": float(pruned.losses[after][mask].mean()),
                }
                for name, mask in (("lost", lost), ("kept", ~lost))
                if mask.any()
            }
            for after in AFTER
            if after in whole.losses
        },
        "who_lost": who_lost(data, whole.validation[:, :-1].reshape(-1), whole.domain, lost),
    }


def tokens(arguments: argparse.Namespace, seed: int) -> PreparedData:
    folder = arguments.work / f"data-seed{seed}"
    if not folder.is_dir():
        specs = [f"{domain}={arguments.text / domain}.jsonl" for domain in DOMAINS]
        sizes: dict[str, Any] = {"vocab_size": OPTIONS.vocab_size, "sequence_length": OPTIONS.sequence_length}
        save_prepared(prepare(specs, max_bytes=8_000_000, seed=seed, **sizes), folder)
    return load_prepared(folder)


class Training:
    """One run, and what it records.

    losses: {steps after the pruning: loss of each validation token (N * (L - 1),)}; -1 is just before the pruning.
    routed: {layer: (N * L, K) experts of each validation token} just before it.
    """

    def __init__(self, arguments: argparse.Namespace, data: PreparedData, seed: int, *, prune: bool) -> None:
        self.steps, self.prune_at, self.seed = arguments.steps, arguments.prune_at, seed
        set_seed(seed)
        self.model = make_model(OPTIONS.settings.model, model_config(OPTIONS.settings.model, data.tokenizer))
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))  # as in `pretrain`
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 20, self.steps)
        rule: dict[str, Any] = {"at_step": self.prune_at, "target_params": arguments.target} if prune else {}
        self.laep = LAEP(self.model, self.optimizer, window_steps=WINDOW, **(rule or {"prunings": ()}))
        self.train = BlockDataset(data.train)
        each = BLOCKS // len(DOMAINS)
        blocks = [(domain, BlockDataset(data.validation[domain])) for domain in DOMAINS]
        rows = [(domain, found[row]["input_ids"]) for domain, found in blocks for row in range(min(each, len(found)))]
        self.validation = torch.stack([row for _, row in rows])  # (N, L)
        self.domain = [domain for domain, row in rows for _ in range(len(row) - 1)]
        self.losses: dict[int, Tensor] = {}
        self.routed: dict[int, Tensor] = {}
        self.windows: list[dict[str, Any]] = []

    def run(self) -> None:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
        for step in range(1, self.steps + 1):
            first = (step - 1) * OPTIONS.batch_size
            batch = torch.stack(
                [
                    self.train[int(order[row % len(order)])]["input_ids"]
                    for row in range(first, first + OPTIONS.batch_size)
                ]
            )
            self.model.train()
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if step == self.prune_at:
                with routes(self.laep.moe, self.routed):
                    self.losses[-1] = self.token_losses()
            self.laep.step()
            if step - self.prune_at in AFTER:
                self.losses[step - self.prune_at] = self.token_losses()
            if step % WINDOW == 0:
                self.windows.append(self.window(step, loss.item()))

    @torch.no_grad()
    def token_losses(self) -> Tensor:
        self.model.eval()
        parts = []
        for rows in self.validation.split(OPTIONS.batch_size):
            logits = self.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            parts.append(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
        return torch.cat(parts)

    @torch.no_grad()
    def window(self, step: int, loss: float) -> dict[str, Any]:
        moe = self.laep.moe
        found: dict[int, float] = {}
        with entropies(moe, found):
            self.model.eval()
            self.model(input_ids=self.validation[:: max(1, BLOCKS // 16)], use_cache=False)
        stats = self.laep.last_window
        assert stats is not None
        loads = {str(layer): counts for layer, counts in stats.loads().items()}
        before = self.windows[-1]["loads"] if self.windows else {}
        ranks = {
            layer: float(spearmanr(before[layer], counts).statistic)
            for layer, counts in loads.items()
            if len(before.get(layer, ())) == len(counts)
        }
        return {
            "step": step,
            "loss": loss,
            "loads": loads,
            "rank_correlation": ranks,
            "entropy": {str(layer): value for layer, value in found.items()},
        }


@contextmanager
def routes(moe: MoEModel, found: dict[int, Tensor]) -> Iterator[None]:
    """While it lasts, `found` grows by the (T, K) experts of the tokens of each call."""
    handles = []
    for layer, block in moe.blocks.items():

        def note(module: nn.Module, args: Any, kwargs: Any, layer: int = layer, block: Any = block) -> None:
            index = read_index(f"{block.name}.experts", args, kwargs)
            found[layer] = torch.cat([found[layer], index]) if layer in found else index

        handles.append(block.experts.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def entropies(moe: MoEModel, found: dict[int, float]) -> Iterator[None]:
    """While it lasts, `found` gets the mean entropy of each router's softmax, 1 for an even one."""
    handles = []
    for layer, block in moe.blocks.items():
        rows = next(iter(block.router.parameters()))

        def note(module: nn.Module, args: Any, output: Any, layer: int = layer, rows: Tensor = rows) -> None:
            logs = nn.functional.linear(args[0].reshape(-1, rows.shape[1]), rows).float().log_softmax(dim=-1)
            found[layer] = float(-(logs.exp() * logs).sum(dim=-1).mean() / math.log(len(rows)))

        handles.append(block.router.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def who_lost(data: PreparedData, ids: Tensor, domain: list[str], lost: Tensor) -> dict[str, Any]:
    """The share of tokens that lost an expert, by domain, and by how common the token is (bins of equal size)."""
    blocks = BlockDataset(data.train)
    seen = torch.cat([blocks[row]["input_ids"] for row in range(len(blocks))])
    counts = torch.bincount(seen, minlength=OPTIONS.vocab_size)[ids]
    order = counts.argsort(descending=True, stable=True)
    bins = [float(lost[part].float().mean()) for part in order.chunk(FREQUENCY_BINS)]
    names = Counter(domain)
    shares = {name: float(lost[torch.tensor([one == name for one in domain])].float().mean()) for name in sorted(names)}
    return {"by_domain": shares, "by_frequency_common_first": bins}


if __name__ == "__main__":
    main()
