"""LAEP in a plain loop with what such loops have: clipped gradients, averaged weights, two optimizers.

python examples/averaged_weights.py
"""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, OlmoeConfig

from secateur import LAEP


def main() -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)]
    parameters = list(model.parameters())  # a pruning keeps these objects, so the list stays right
    pruner = LAEP(model, optimizers, copies=[average], alpha=0.6, beta=0.2, at_step=20, window_steps=5)
    for _ in range(30):
        tokens = torch.randint(0, 256, (4, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        event = pruner.step()  # the average has been pruned too
        for optimizer in optimizers:
            optimizer.zero_grad()
        average.update_parameters(model)
        if event:
            print(event.describe())


if __name__ == "__main__":
    main()
