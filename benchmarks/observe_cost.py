"""What observing costs: a forward pass, the same with all criteria observed, and with every expert on every token.

    python benchmarks/observe_cost.py

One model a row, in one process: rounds of the three kinds in turn, each kind first as often as the others, on the same
batch; the ratio to the plain pass of the same round. Medians of all rounds, with their 95 % bootstrap range. On the CPU
it is processor time of one thread, since the wall clock of a shared machine scatters by more than what is measured.
Every expert on every token: beside the plain pass each expert runs on all tokens, and the same sums are taken of the
routed ones. Its result is observe_cost.json.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from record import parser_for, show, store
from secateur.families import describe_moe
from secateur.observation.activations import ActivationObserver

BATCH, LENGTH, VOCABULARY = 4, 256, 4096
COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
# model type -> fields; the shares of attention, experts and top-k are those of published models of the family
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "head_dim": 64,
                  "num_key_value_heads": 2, "intermediate_size": 1024},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024, "num_key_value_heads": 2},
    "deepseek_v3": {"n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "n_group": 1,
                    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 1024,
                    "num_key_value_heads": 8, **MLA},
    "gpt_oss": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 256, "head_dim": 64,
                "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip
KINDS = ("plain", "observed", "every expert")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of the three kinds, for every model")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    results = {name: measure(build(name).to(device), arguments.rounds) for name in arguments.models}
    columns = ["model", "parameters", "experts", "top-k", "plain pass", "observed", "every expert on every token"]
    rows = [
        [
            name,
            f"{one['parameters'] / 1e6:.1f} M",
            str(one["experts"]),
            str(one["top_k"]),
            f"{1000 * one['seconds']['plain']:.0f} ms",
            *(_ratio(one["ratios"][kind]) for kind in KINDS[1:]),
        ]
        for name, one in results.items()
    ]
    show("Observing: time of a forward pass over that of the plain one", columns, rows)
    together = {kind: pooled([r for one in results.values() for r in one["rounds"][kind]]) for kind in KINDS[1:]}
    print("all models:", together)
    record = {"batch": BATCH, "sequence_length": LENGTH, "models": results, "all_models": together}
    print(store("observe_cost", {**record, "table": [columns, *rows]}, stored=arguments.store))


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON | MODELS[name]))
    return model.eval()


def measure(model: PreTrainedModel, rounds: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    watching: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "observed": lambda: observed(model),
        "every expert": lambda: every_expert(model),
    }

    @torch.no_grad()
    def seconds(kind: str) -> float:
        with watching[kind]():
            model(
                input_ids=tokens, use_cache=False
            )  # an observer checks its first pass, which is no part of the others
            started = clock()
            model(input_ids=tokens, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - started

    for kind in KINDS:
        seconds(kind)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:  # each first in turn, so that drift cancels
            taken[kind].append(seconds(kind))
    ratios = {kind: [one / plain for one, plain in zip(taken[kind], taken["plain"], strict=True)] for kind in KINDS[1:]}
    moe = describe_moe(model)
    return {
        "parameters": moe.num_parameters,
        "experts": max(moe.counts.values()),
        "top_k": moe.top_k,
        "seconds": {kind: statistics.median(times) for kind, times in taken.items()},
        "rounds": ratios,
        "ratios": {kind: pooled(one) for kind, one in ratios.items()},
    }


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[None]:
    observer = ActivationObserver(describe_moe(model, _layout(model)))
    try:
        yield
    finally:
        observer.detach()


@contextmanager
def every_expert(model: PreTrainedModel) -> Iterator[None]:
    """Before the experts of a layer run, each runs on all tokens, and the norms of the routed ones are summed."""
    moe = describe_moe(model, _layout(model))
    handles = []
    for block in moe.blocks.values():
        forward = block.experts.forward

        def run_all(
            module: nn.Module, args: Any, forward: Callable[..., Tensor] = forward, experts: int = block.num_experts
        ) -> None:
            hidden, index, gates = args
            ones = torch.ones_like(gates[:, :1])
            for expert in range(experts):
                output = forward(hidden, torch.full_like(index[:, :1], expert), ones)
                norms = torch.linalg.vector_norm(output.reshape(len(index), -1), dim=-1)
                routed = index == expert
                for one in (norms, norms.square(), norms * (gates * routed).sum(-1)):
                    (one.double() * routed.any(-1)).sum()
                output.abs().amax(-1)

        handles.append(block.experts.register_forward_pre_hook(run_all))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LAYOUTS: dict[int, Any] = {}


def _layout(model: PreTrainedModel) -> Any:
    """Found once a model: it is no part of what is measured."""
    if id(model) not in LAYOUTS:
        LAYOUTS[id(model)] = describe_moe(model).layout
    return LAYOUTS[id(model)]


def pooled(ratios: list[float]) -> dict[str, Any]:
    """Median of all rounds, with its 95 % bootstrap range."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return {
        "rounds": len(ratios),
        "median_ratio": statistics.median(ratios),
        "bootstrap_95": [medians[100], medians[3899]],
    }


def _ratio(one: dict[str, Any]) -> str:
    low, high = one["bootstrap_95"]
    return f"{one['median_ratio']:.3f}x ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
