"""A BAM computes what its dense parents compute: with one expert, with one-hot routers, with equal experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.families import logits_of
from secateur.models.bam import BamForCausalLM
from support.tiny_bam import PARENTS, dense_parent, mixed, random_ids

every_parent = pytest.mark.parametrize("name", PARENTS)


@contextmanager
def one_hot(model: BamForCausalLM, expert: int) -> Iterator[None]:
    """While it lasts, both routers of every layer choose this expert with the weight 1."""

    def for_attention(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], nn.functional.one_hot(torch.full((len(output[0]),), expert), output[1].shape[1]).float()

    def for_ffn(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return output[0], torch.ones_like(output[1]), torch.full_like(output[2], expert)

    hooks = []
    for layer in model.model.layers:
        hooks += [layer.self_attn.router.register_forward_hook(for_attention)]
        hooks += [layer.mlp.gate.register_forward_hook(for_ffn)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@every_parent
def test_with_one_expert_it_is_the_parent(name: str) -> None:
    parent, ids = dense_parent(name, seed=0), random_ids(2, 11)
    torch.testing.assert_close(logits_of(mixed(name, [parent]), ids), logits_of(parent, ids), rtol=1e-4, atol=2e-5)


@every_parent
def test_one_hot_routers_give_back_each_parent_where_norms_and_embeddings_are_the_same(name: str) -> None:
    parents, ids = [dense_parent(name, seed=seed) for seed in (0, 1)], random_ids(2, 11)
    first, second = (dict(parent.named_parameters()) for parent in parents)
    with torch.no_grad():
        for key in first:
            if not any(part in key for part in ("self_attn", "attention.", "mlp")):
                second[key].copy_(first[key])
    model = mixed(name, parents)
    found = []
    for expert, parent in enumerate(parents):
        with one_hot(model, expert):
            found.append(logits_of(model, ids))
        torch.testing.assert_close(found[-1], logits_of(parent, ids), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(*found, atol=1e-2)


@every_parent
@pytest.mark.parametrize("kv_experts", [True, False])
def test_equal_experts_are_the_parent_whatever_the_routers_say_if_the_weight_of_the_ffn_is_1(
    name: str, kv_experts: bool
) -> None:
    parent, ids = dense_parent(name, seed=0), random_ids(2, 11)
    model = mixed(name, [parent] * 3, kv_experts=kv_experts, renormalise_top1=True, router_init_std=1.0)
    torch.testing.assert_close(logits_of(model, ids), logits_of(parent, ids), rtol=1e-4, atol=2e-5)
    plain = mixed(name, [parent] * 3, kv_experts=kv_experts)  # its FFN branch is scaled by about a third
    assert not torch.allclose(logits_of(plain, ids), logits_of(parent, ids), atol=1e-2)
