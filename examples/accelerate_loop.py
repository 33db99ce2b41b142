"""LAEP in a loop of Hugging Face Accelerate: the model as it was before `prepare`, the optimizer as it is after.

python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, MixtralConfig

from secateur import LAEP


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
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
    loader = DataLoader(list(torch.randint(0, 256, (240, 32))), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = LAEP(model, optimizer, alpha=0.6, beta=0.2, at_step=20, window_steps=5)
    for tokens in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            event = pruner.step() if accelerator.sync_gradients else None
            optimizer.zero_grad()
        if event:
            accelerator.print(event.describe())


if __name__ == "__main__":
    main()
