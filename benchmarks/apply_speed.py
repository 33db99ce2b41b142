"""Speed and memory of `secateur apply` on a large checkpoint, against the system's copy and against transformers.

    python benchmarks/apply_speed.py /big/disk/folder --gigabytes 8

A synthetic Qwen3-MoE of that size is written to the folder, in files of 1 GB, and kept there for the next time. Then in
turns: `apply` with a plan that keeps three quarters of the experts, each in a process of its own; `cp` of the folder
that it wrote, which is a copy of just the kept bytes; and the same followed by `sync` of the copy, as `apply` flushes
what it writes. A ratio is that of one turn, and the median of the turns counts. Once in the same run: load, slice and
save with transformers. Seconds leave out the start of Python and its imports, which are told apart; memory is the peak
of the whole process. The page cache is as the turn before left it. Its result is apply_speed.json.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from record import parser_for, show, store
from secateur.plans import LayerPlan, Plan

NUM_EXPERTS, HIDDEN, WIDTH, VOCABULARY = 64, 2048, 768, 32_000
KEEP = 48
FILE_BYTES = 10**9

# What a child does; it prints its seconds without the imports, and its peak memory. Not by getrusage, which on Linux
# begins at that of the parent.
TELL = """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([time.perf_counter() - start, int(peak) * 1024]))
"""
APPLY = """
import json, sys, time
from pathlib import Path
import secateur.model_folder.rewrite.apply as apply
from secateur.plans import Plan
start = time.perf_counter()
apply.apply_to_model(Path(sys.argv[1]), Plan.load(sys.argv[2]), Path(sys.argv[3]))
"""
TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from secateur.families import describe_moe
from secateur.plans import Plan
from secateur.surgery.module import prune_model_
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
prune_model_(describe_moe(model), Plan.load(sys.argv[2]))
model.save_pretrained(sys.argv[3], max_shard_size="1GB")
"""


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("folder", type=Path, help="on a disk with room for four times the size")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint, at least")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="smaller for a trial")
    parser.add_argument("--no-transformers", action="store_true", help="leave out load, slice and save")
    arguments = parser.parse_args()
    source = checkpoint(arguments.folder, arguments.gigabytes, arguments.hidden)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    plan = arguments.folder / "plan.json"
    order = tuple(expert for expert in range(NUM_EXPERTS) if expert % 4)  # every fourth goes: the runs are short
    kept = {layer: LayerPlan(experts_before=NUM_EXPERTS, order=order[:KEEP]) for layer in range(layers)}
    Plan(layers=kept, criterion="every fourth goes").save(plan)
    turns = [turn(source, plan, arguments.folder) for _ in range(arguments.turns)]
    result: dict[str, Any] = {"source_bytes": size, "layers": layers, "experts": NUM_EXPERTS, "keep": KEEP}
    result |= {"kept_bytes": turns[0].pop("bytes"), "turns": turns}
    for one in turns[1:]:
        one.pop("bytes")
    for copy in ("copy", "copy_and_sync"):
        result[f"speed_over_{copy}"] = statistics.median(one[copy] / one["apply"]["seconds"] for one in turns)
    result["peak_memory_bytes"] = max(one["apply"]["peak_memory_bytes"] for one in turns)
    if not arguments.no_transformers:
        result["transformers"] = child(TRANSFORMERS, source, plan, fresh(arguments.folder / "by-transformers"))
    result["table"] = report(result)
    print(f"stored in {store('apply_speed', result, stored=arguments.store)}")


def turn(source: Path, plan: Path, folder: Path) -> dict[str, Any]:
    out, copy = fresh(folder / "out"), fresh(folder / "copy")
    applied = child(APPLY, source, plan, out)
    weights = sorted(out.glob("*.safetensors"))
    copy.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, weights), str(copy)], check=True)
    copied = time.perf_counter() - start
    subprocess.run(["sync", *(str(copy / path.name) for path in weights)], check=True)
    synced = time.perf_counter() - start
    return {
        "apply": applied,
        "copy": copied,
        "copy_and_sync": synced,
        "bytes": sum(path.stat().st_size for path in weights),
    }


def child(code: str, *paths: Path) -> dict[str, Any]:
    """Seconds that the child tells, those of its whole life, and its peak memory."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + TELL, *map(str, paths)], stdout=subprocess.PIPE, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else (None, None)
    return {
        "status": done.returncode,
        "seconds": seconds,
        "seconds_with_start": time.perf_counter() - start,
        "peak_memory_bytes": peak,
    }


def fresh(folder: Path) -> Path:
    """A path with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def checkpoint(folder: Path, gigabytes: float, hidden: int) -> Path:
    """A Qwen3-MoE of at least this size with random weights, made once."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=8,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    layer_bytes = NUM_EXPERTS * 3 * hidden * WIDTH * 2
    config.num_hidden_layers = max(1, -(-int(gigabytes * 1e9) // layer_bytes))
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    done = folder / f"source-{hidden}-{config.num_hidden_layers}"
    if done.is_dir():
        return done
    half = fresh(folder / "source.partial")
    half.mkdir(parents=True)
    config.save_pretrained(half)
    (half / "README.md").write_text("Random weights, to measure with.\n")
    write_weights(half, shapes(config))
    half.rename(done)
    return done


def shapes(config: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        found |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{layer}.self_attn.{name}_norm.weight": (heads,) for name in "qk"}
        for name, rows in (("q", config.num_attention_heads), ("k", 4), ("v", 4)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows * heads, hidden)
        found[f"{layer}.self_attn.o_proj.weight"] = (hidden, config.num_attention_heads * heads)
        found[f"{layer}.mlp.gate.weight"] = (NUM_EXPERTS, hidden)
        for expert in range(NUM_EXPERTS):
            for name, shape in (("gate", (WIDTH, hidden)), ("up", (WIDTH, hidden)), ("down", (hidden, WIDTH))):
                found[f"{layer}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def write_weights(folder: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Files of about FILE_BYTES, one at a time in memory, and their index."""
    groups: list[list[str]] = [[]]
    room = FILE_BYTES
    for name, shape in wanted.items():
        size = 2 * torch.Size(shape).numel()
        if size > room and groups[-1]:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(name)
        room -= size
    listed: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: torch.rand(wanted[name]).to(torch.bfloat16) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def report(result: dict[str, Any]) -> list[list[str]]:
    """Print the table, and give it."""
    kept = result["kept_bytes"]
    rows = []
    for number, one in enumerate(result["turns"], start=1):
        applied = one["apply"]
        for name, seconds in (("apply", applied["seconds"]), ("cp", one["copy"]), ("cp, sync", one["copy_and_sync"])):
            memory = f"{applied['peak_memory_bytes'] / 2**20:.0f}" if name == "apply" else ""
            rows.append([f"turn {number}: {name}", f"{seconds:.2f}", f"{kept / seconds / 1e9:.2f}", memory])
    if found := result.get("transformers"):
        seconds = found["seconds"]
        rows.append(
            [
                "load, slice, save" if seconds else f"load, slice, save: ended with {found['status']}",
                f"{seconds:.2f}" if seconds else "",
                f"{kept / seconds / 1e9:.2f}" if seconds else "",
                f"{found['peak_memory_bytes'] / 2**20:.0f}" if seconds else "",
            ]
        )
    columns = ["", "seconds", "GB/s", "peak MiB"]
    title = f"{result['source_bytes'] / 1e9:.2f} GB -> {kept / 1e9:.2f} GB"
    show(title, columns, rows)
    for copy in ("copy", "copy_and_sync"):
        print(f"speed of apply over {copy.replace('_', ' ')}: {result[f'speed_over_{copy}']:.2f} (median of the turns)")
    return [columns, *rows]


if __name__ == "__main__":
    main()
