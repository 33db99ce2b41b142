"""LAEP in a loop of your own on several devices: FSDP2 and expert parallelism by transformers' distributed layer.

    torchrun --nproc-per-node 2 examples/sharded_loop.py

Every rank holds half of the experts. At the pruning the kept ones are re-ordered so that both ranks get the same load.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from secateur import LAEP
from secateur.train.distributed import launch

CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
)


def main() -> None:
    launch.join()  # torch.distributed.init_process_group, on gloo or NCCL; nothing in a job of one process
    world, rank = launch.world_size(), launch.rank()
    folder = Path(launch.once(tempfile.mkdtemp)) / "start"
    if rank == 0:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    launch.barrier()
    split = {"distributed_config": DistributedConfig(fsdp_size=world, ep_size=world)} if world > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **split).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = LAEP(model, optimizer, target_params=0.8, at_step=20, window_steps=5)
    words = torch.Generator().manual_seed(0)
    for step in range(30):
        tokens = (torch.rand(8, 32, generator=words) ** 2 * 256).long().chunk(world)[rank]  # this rank's sequences
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        event = pruner.step()  # all ranks prune at the same step
        optimizer.zero_grad()
        if event is not None and rank == 0:
            print(event.describe())
        if step % 10 == 9 and rank == 0:
            print(f"step {step + 1}: loss on this rank {loss.item():.3f}")
    model.save_pretrained(folder.parent / "pruned")  # gathered on rank 0: an ordinary checkpoint
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
