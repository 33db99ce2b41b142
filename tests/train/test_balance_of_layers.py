"""transformers' own balance loss, told each layer's count: for one count it is the same number."""

from __future__ import annotations

import inspect

import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from secateur.modeling_secateur import balance_loss_by_layer


def logits_of(*counts: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(12, count, generator=generator) for count in counts)


balance_loss_by_layer(modeling_qwen3_moe.Qwen3MoeForCausalLM)
ours = modeling_qwen3_moe.load_balancing_loss_func
stock = inspect.unwrap(ours)
MASK = torch.tensor([[1] * 12, [0] * 12])[:1]


def test_layers_of_one_count_have_the_loss_of_transformers_bit_for_bit() -> None:
    for mask in (None, MASK):
        assert torch.equal(ours(logits_of(8, 8, 8), 8, 2, mask), stock(logits_of(8, 8, 8), 8, 2, mask))
    assert torch.equal(ours(logits_of(6, 6), 8, 2), stock(logits_of(6, 6), 6, 2))  # asked with the count of before
    assert ours(None, 8, 2) == stock(None, 8, 2) == 0


def test_layers_that_differ_have_the_mean_of_their_own_losses() -> None:
    parts = [stock((logits,), logits.shape[-1], 2, MASK) for logits in logits_of(6, 4, 8)]
    assert torch.equal(ours(logits_of(6, 4, 8), 8, 2, MASK), torch.stack(parts).mean())


def test_a_trainer_that_takes_the_function_of_mixtral_for_all_families_gets_it_and_nothing_is_wrapped_twice() -> None:
    assert hasattr(modeling_mixtral.load_balancing_loss_func, "by_layer")
    before = modeling_mixtral.load_balancing_loss_func
    balance_loss_by_layer(modeling_qwen3_moe.Qwen3MoeForCausalLM)
    assert modeling_mixtral.load_balancing_loss_func is before
