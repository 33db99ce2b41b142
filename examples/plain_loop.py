"""LAEP in a plain PyTorch loop: `pruner.step()` after `optimizer.step()`.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from secateur import LAEP


def main() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = LAEP(model, optimizer, alpha=0.6, beta=0.2, at_step=20, window_steps=5)
    for _ in range(30):
        tokens = torch.randint(0, 256, (4, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        event = pruner.step()
        optimizer.zero_grad()
        if event:
            print(event.describe())


if __name__ == "__main__":
    main()
