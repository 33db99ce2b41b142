"""What is recorded of the experts of a V-MoE: the pairs that found a place, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from secateur.families import describe_moe, logits_of
from secateur.models.vmoe import VMoEConfig, VMoEForImageClassification
from secateur.models.vmoe.flops import flops_per_image
from secateur.observation.activations import ActivationObserver
from secateur.stats import DEFAULT_SUMS, LayerStats, RouterStats
from support.tiny_vision import every_kind, random_images, tiny_vmoe

TOKENS = 17  # of an image: 16 patches and the class token


def observed(model: Any, *batches: Tensor) -> RouterStats:
    observer = ActivationObserver(describe_moe(model))
    for batch in batches:
        logits_of(model, batch)
    observer.detach()
    return observer.read()


def close(found: RouterStats, expected: RouterStats) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for layer, one in found.layers.items():
        other = expected.layers[layer]
        assert one.num_tokens == other.num_tokens
        assert one.token_count.tolist() == other.token_count.tolist()
        for name in DEFAULT_SUMS:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)


def plain_loop(model: VMoEForImageClassification, images: Tensor) -> RouterStats:
    """Every pair that an experts module is called with, one after another."""
    layers = {}
    calls: dict[int, list[tuple[Any, ...]]] = {0: [], 2: []}
    handles = [
        model.vmoe.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: calls[layer].append(args)
        )
        for layer in calls
    ]
    logits_of(model, images)
    for handle in handles:
        handle.remove()
    for layer, ((inputs, experts, gates),) in calls.items():
        module: Any = model.vmoe.layers[layer].mlp.experts
        count = torch.zeros(module.num_experts, dtype=torch.int64)
        sums = {name: torch.zeros(module.num_experts, dtype=torch.float64) for name in DEFAULT_SUMS}
        for row, (expert,), (gate,) in zip(inputs, experts.tolist(), gates.tolist(), strict=True):
            inner = module.act_fn(module.up_proj[expert] @ row + module.up_proj_bias[expert])
            outer = (module.down_proj[expert] @ inner + module.down_proj_bias[expert]).detach()
            norm = float(outer.norm())
            count[expert] += 1
            added = {"weight_sum": gate, "norm_sum": norm, "norm_square_sum": norm**2, "weighted_norm_sum": gate * norm}
            for name, value in added.items():
                sums[name][expert] += value
            largest = sums["max_activation"]
            largest[expert] = max(float(largest[expert]), float(outer.abs().max()))
        num_tokens = len(images) * model.config.ensemble_size * (16 + (model.config.classifier == "token"))
        layers[layer] = LayerStats(num_tokens=num_tokens, token_count=count, **sums)
    return RouterStats(layers=layers)


@every_kind
def test_the_sums_are_those_of_a_plain_loop_over_the_pairs(kind: str) -> None:
    model, images = tiny_vmoe(kind), random_images(3)
    before = logits_of(model, images)
    close(observed(model, images), plain_loop(model, images))
    assert torch.equal(logits_of(model, images), before)


@pytest.mark.parametrize("kind", ["few places", "over tokens"])
def test_groups_of_images_can_be_observed_apart_and_added(kind: str) -> None:
    model, images = tiny_vmoe(kind), random_images(8)
    at_once = observed(model, images)
    close(observed(model, images[:2]) + observed(model, images[2:]), at_once)
    close(observed(model, images[:4], images[4:]), at_once)


def test_a_pair_without_a_place_is_not_counted_and_its_token_is() -> None:
    images = random_images(4)
    for found in observed(tiny_vmoe("few places"), images).layers.values():
        assert found.num_tokens == 4 * TOKENS
        # 2 images share 34 * 2 * 0.5 / 8 = 4.25 places of an expert; 2 groups
        assert int(found.token_count.max()) == 2 * 4
        assert int(found.token_count.sum()) < 2 * 4 * TOKENS
    for found in observed(tiny_vmoe("token choice"), images).layers.values():
        assert int(found.token_count.sum()) == 2 * 4 * TOKENS


def test_where_the_batch_is_the_group_its_size_decides_who_finds_a_place() -> None:
    model, images = tiny_vmoe("few places", group_images=None), random_images(8)
    assert observed(model, images).loads() != observed(model, *images.split(1)).loads()


def test_training_is_not_observed() -> None:
    model, images = tiny_vmoe("token choice"), random_images(2)
    observer = ActivationObserver(describe_moe(model))
    logits_of(model, images)
    expected = observer.read()
    model.train()
    model(images)
    close(observer.read(), expected)
    observer.detach()


# --- operations ----------------------------------------------------------------------------------------------------


def test_operations_of_a_small_ensemble_are_those_counted_by_hand() -> None:
    config = VMoEConfig(
        image_size=4, patch_size=2, num_channels=1, hidden_size=2, intermediate_size=3, num_hidden_layers=3,
        num_attention_heads=1, moe_layers=[1], num_experts=4, num_experts_per_tok=1, ensemble_size=2,
        representation_size=5, num_labels=3,
    )  # fmt: skip
    assert flops_per_image(config, router_rows={1: 4}, pairs={1: 7}) == {
        "embedding": 2 * 4 * 4 * 2,  # 4 patches of 4 pixels to width 2
        "attention": 5 * (2 * 5 * 4 * (2 * 2) + 2 * 2 * 5 * 5 * 2),  # block 0 once, the others for 2 members; 5 tokens
        "mlp": 3 * (2 * 5 * (2 * 3 + 3 * 2)),  # block 0 once, block 2 twice
        "router": 2 * 10 * (2 * 4),
        "experts": 2 * 7 * (2 * 3 + 3 * 2),
        "head": 2 * 2 * (2 * 5 + 5 * 3),
    }


@every_kind
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    model, images = tiny_vmoe(kind), random_images(4)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")  # torch counts that of sdpa on some devices only
    pairs = {layer: sum(loads) / 4 for layer, loads in observed(model, images).loads().items()}
    rows = {layer: len(model.vmoe.layers[layer].mlp.router.weight) for layer in pairs}
    with FlopCounterMode(display=False) as counter:
        logits_of(model, images)
    assert 4 * sum(flops_per_image(model.config, router_rows=rows, pairs=pairs).values()) == counter.get_total_flops()
