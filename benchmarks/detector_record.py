"""Record the load histories of unpruned runs on real text (benchmarks/detector_grid.py).

    python benchmarks/fetch_text.py TEXT && python benchmarks/detector_record.py TEXT --work WORK

One thread a process; as many processes as are started share the work. A run that is in WORK is not repeated, nor one
that is in benchmarks/results already. Besides the loads of each window it keeps what other detectors would look at: the
learning rate, the loss, each expert's share of the squared gradient, and the mean margin between the last chosen
expert's logit and the next.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from detector_grid import SEEDS, SEQUENCE, SETTINGS, VOCABULARY, Setting
from detector_histories import ARRAYS, names_stored
from laep_quality import write_code
from secateur.data.prepare import load_prepared, prepare, save_prepared
from secateur.errors import SecateurError
from secateur.families import MoEModel
from secateur.files.lock import locked
from secateur.pretraining.presets import COMMON, PRESETS
from secateur.train.balance import attach_balance
from secateur.train.laep import LAEP

MAX_BYTES = 24_000_000
MICRO_BATCH = 32  # sequences: larger ones are slower
EVERY = 5  # steps between two looks at gradients and margins
SECONDS = 520  # a run, on average, on one core
DECAY_SHARE = 0.2  # of the steps, in which WSD goes down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    done = names_stored()
    jobs = [(seed, setting) for seed in range(SEEDS) for setting in SETTINGS if name_of(setting, seed) not in done]
    print(f"{len(jobs)} runs times about {SECONDS} s", flush=True)
    blocks = prepared(arguments.text, arguments.work)
    for seed, setting in jobs:
        path = arguments.work / f"{name_of(setting, seed)}.npz"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path.with_suffix(".lock"), "another process has it"))
            except SecateurError:
                continue
            if not path.exists():
                record_to(path, setting, seed, blocks)


def record_to(path: Path, setting: Setting, seed: int, blocks: Tensor) -> None:
    """Write beside, then rename: a file of that name is whole."""
    began = time.perf_counter()
    arrays = record(setting, seed, blocks)
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        np.savez_compressed(file, **arrays)
    beside.rename(path)
    loss = arrays["loss"]
    print(f"{path.stem}: {time.perf_counter() - began:.0f} s, loss {loss[0]:.2f} to {loss[-1]:.2f}", flush=True)


def name_of(setting: Setting, seed: int) -> str:
    return f"{setting.name}-seed{seed}"


def prepared(text: Path, work: Path) -> Tensor:
    """(N, S) the training blocks, made once for all."""
    folder = work / "data"
    if not folder.exists():
        write_code(text)
        specs = [f"{domain}={text / domain}.jsonl" for domain in ("code", "manuals", "dictionary", "speeches")]
        data = prepare(specs, vocab_size=VOCABULARY, sequence_length=SEQUENCE, max_bytes=MAX_BYTES)
        save_prepared(data, folder)
    return load_prepared(folder).train.blocks


def record(setting: Setting, seed: int, blocks: Tensor) -> dict[str, Any]:
    """Train, and return what `detector_histories.ARRAYS` names, one row a window."""
    torch.manual_seed(seed)
    model_type, _, fields = PRESETS[setting.preset]
    config = AutoConfig.for_model(model_type, **{**COMMON, **fields, **setting.model()})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = schedule_of(setting, optimizer)
    laep = LAEP(model, optimizer, prunings=[], window_steps=setting.window_steps)
    balance = attach_balance(model, setting.balance, blocks=laep.moe.blocks)
    look = Look(laep.moe)
    rows: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    losses: list[float] = []
    sequences = setting.tokens // SEQUENCE
    batches = batches_of(blocks, sequences, seed)
    for step in range(1, setting.steps + 1):
        batch = next(batches)
        parts = batch.split(min(sequences, MICRO_BATCH))
        look.open = step % EVERY == 0
        loss = 0.0
        for part in parts:
            out = model(input_ids=part, labels=part).loss / len(parts)
            out.backward()
            loss += float(out.detach())
        losses.append(loss)
        if look.open:
            look.gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance.after_optimizer_step()
        laep.step()
        if laep.last_window is not None:
            rows["steps"].append(step)
            rows["loads"].append(list(laep.last_window.loads().values()))
            rows["learning_rate"].append(scheduler.get_last_lr()[0])
            rows["loss"].append(sum(losses) / len(losses))
            gradient, margin = look.read()
            rows["gradient"].append(gradient)
            rows["margin"].append(margin)
            losses = []
        scheduler.step()
        optimizer.zero_grad()
    return {name: np.asarray(rows[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def schedule_of(setting: Setting, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    kind = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}.get(setting.schedule, setting.schedule)
    more = {"num_decay_steps": int(DECAY_SHARE * setting.steps)} if setting.schedule == "wsd" else {}
    return get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=setting.warmup,
        num_training_steps=setting.steps,
        scheduler_specific_kwargs=more,
    )


def batches_of(blocks: Tensor, sequences: int, seed: int) -> Iterator[Tensor]:
    """Epochs without end, each in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks), generator=draw)
        for start in range(0, len(order) - sequences + 1, sequences):
            yield blocks[order[start : start + sequences]].to(torch.int64)


class Look:
    """Gradients and margins in the steps where it is open."""

    def __init__(self, moe: MoEModel) -> None:
        self.open = False
        self._top_k = moe.top_k
        self._blocks = moe.blocks
        self._gradient: dict[int, list[Tensor]] = {layer: [] for layer in moe.blocks}
        self._margin: dict[int, list[float]] = {layer: [] for layer in moe.blocks}
        for layer, block in moe.blocks.items():
            block.router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.open:
                top = output[0].detach().topk(self._top_k + 1, dim=-1).values
                self._margin[layer].append(float((top[:, -2] - top[:, -1]).mean()))

        return hook

    def gradients(self) -> None:
        """Of each expert: its share of the layer's squared gradient."""
        for layer, block in self._blocks.items():
            found = [p.grad.flatten(1).square().sum(1) for p in block.experts.parameters() if p.grad is not None]
            self._gradient[layer].append(torch.stack(found).sum(0))

    def read(self) -> tuple[list[list[int]], list[float]]:
        """The means since the last call: 1/65535 of the layer's gradient, and logits."""
        sums = [torch.stack(values).sum(0) for values in self._gradient.values()]
        gradient = [(total / total.sum().clamp(min=1e-30) * 65535).round().int().tolist() for total in sums]
        margin = [sum(values) / len(values) for values in self._margin.values()]
        for kept in (self._gradient, self._margin):
            for values in kept.values():
                values.clear()
        return gradient, margin


if __name__ == "__main__":
    main()
