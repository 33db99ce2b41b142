"""Every sum of the table is seen in a pass that runs anyway, changes no bit of it, and is refused where it hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.observation.activations import ActivationObserver, LayerObserver
from secateur.observation.shown import ROWS, axis_sizes, implementation_of
from secateur.stats import DEFAULT_SUMS, SUMS, LayerStats, RouterStats
from support.tiny_models import every_family, random_tokens, tiny_model
from support.tiny_vision import random_images, tiny_vmoe

TOKENS = random_tokens(3, 12)
MASK = torch.ones(3, 12, dtype=torch.int64)
MASK[1, 7:] = 0
# Sums that are written out below; others have the example of a criterion that reads them.
INSIDE = ("neuron_square_sum", "neuron_gram")
WRITTEN_OUT = ("output_sum", "output_square_sum", "input_square_sum", "co_selection", "input_gram", *INSIDE)
Inner = Callable[[Any, Tensor, int], Tensor]  # experts module, (D,) token, id -> (F,) input of the down projection


def visible(moe: MoEModel) -> list[str]:
    """The sums that the experts of a model show."""
    shows_neurons = all(implementation_of(block.experts) in ROWS for block in moe.blocks.values())
    return [name for name, one in SUMS.items() if shows_neurons or "F" not in one.axes]


@torch.no_grad()
def run(moe: MoEModel, **further: Any) -> Tensor:
    return moe.model(input_ids=TOKENS, attention_mask=MASK, use_cache=False, **further).logits


def by_hand(moe: MoEModel, names: list[str], inner: Inner | None = None) -> dict[int, LayerStats]:
    """Every sum by its definition, one token and one expert after another, from what the modules are called with."""
    calls: dict[int, tuple[Tensor, ...]] = {}
    given: dict[int, Tensor] = {}
    handles = []
    for layer, block in moe.blocks.items():

        def record(module: nn.Module, args: Any, layer: int = layer) -> None:
            calls[layer] = args

        def routed(module: nn.Module, args: Any, layer: int = layer) -> None:
            given[layer] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(block.experts.register_forward_pre_hook(record))
        handles.append(block.router.register_forward_pre_hook(routed))
    run(moe)
    for handle in handles:
        handle.remove()
    keep = MASK.reshape(-1).bool().tolist()
    return {
        layer: _layer_by_hand(moe.blocks[layer], call, given[layer], keep, names, inner)
        for layer, call in calls.items()
    }


@torch.no_grad()
def _layer_by_hand(
    block: Any, call: tuple[Tensor, ...], routed: Tensor, keep: list[bool], names: list[str], inner: Inner | None
) -> LayerStats:
    hidden, index, gates = call
    sizes = axis_sizes(block, routed.shape[1])
    count = torch.zeros(block.num_experts, dtype=torch.int64)
    sums = {name: torch.zeros([sizes[axis] for axis in SUMS[name].axes], dtype=torch.float64) for name in names}
    hidden = hidden.reshape(len(index), -1)
    for token in (token for token, is_real in enumerate(keep) if is_real):
        chosen = index[token].tolist()
        for expert, gate in zip(chosen, gates[token].double(), strict=True):
            one = torch.tensor([[expert]]), torch.ones(1, 1)
            shape = (1, 1, -1) if type(block.experts).__name__ == "DbrxExperts" else (1, -1)
            output = block.experts(hidden[token].reshape(shape), *one).flatten().double()
            count[expert] += 1
            sums["output_sum"][expert] += output
            sums["output_square_sum"][expert] += output.square()
            sums["input_square_sum"][expert] += (gate * hidden[token].double()).square()
            sums["co_selection"][expert, chosen] += 1
            if inner is not None:
                neurons = inner(block.experts, hidden[token], expert).double()
                sums["neuron_square_sum"][expert] += (gate * neurons).square()
                sums["neuron_gram"][expert] += neurons.outer(neurons)
        x = routed[token].double()
        sums["input_gram"] += x.outer(x)
    return LayerStats(num_tokens=sum(keep), token_count=count, **sums)


def assert_close(found: RouterStats, expected: dict[int, LayerStats], names: list[str]) -> None:
    assert found.layers.keys() == expected.keys()
    for layer, one in expected.items():
        assert found.layers[layer].num_tokens == one.num_tokens
        assert found.layers[layer].token_count.tolist() == one.token_count.tolist()
        for name in names:
            torch.testing.assert_close(found.layers[layer].sums[name], one.sums[name], rtol=1e-4, atol=1e-7)


@every_family
def test_every_sum_equals_its_definition_and_no_output_bit_changes(name: str) -> None:
    moe = describe_moe(tiny_model(name).eval())
    names = visible(moe)
    plain = run(moe)
    observer = ActivationObserver(moe, sums=names)
    assert torch.equal(run(moe), plain)
    observer.detach()
    stats = observer.read()
    assert stats.sums == tuple(names)
    shown = [one for one in WRITTEN_OUT if one not in INSIDE]
    assert_close(stats, by_hand(moe, shown), shown)
    for one in stats.layers.values():
        assert torch.equal(one.sums["co_selection"].diagonal(), one.token_count.double())


def test_the_same_batches_seen_by_one_observer_and_by_three_add_up_to_the_same() -> None:
    """To 1e-12: the sums of float64 are grouped in another way, the batches compute the same bits."""
    moe = describe_moe(tiny_model("mixtral").eval())
    observers = []
    for batches in (range(3), [0], [1], [2]):
        observers.append(ActivationObserver(moe, sums=SUMS))
        for seed in batches:
            with torch.no_grad():
                moe.model(input_ids=random_tokens(2, 9, seed=seed), use_cache=False)
        observers[-1].detach()
    whole, *parts = (observer.read() for observer in observers)
    total = parts[2] + parts[0] + parts[1]
    for layer, one in whole.layers.items():
        assert torch.equal(total.layers[layer].token_count, one.token_count)
        for name, value in one.sums.items():
            torch.testing.assert_close(total.layers[layer].sums[name], value, rtol=1e-12, atol=1e-12)


def swiglu(experts: Any, token: Tensor, expert: int) -> Tensor:
    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
    return functional.silu(gate) * up


def gpt_oss(experts: Any, token: Tensor, expert: int) -> Tensor:
    both = token @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared_relu(experts: Any, token: Tensor, expert: int) -> Tensor:
    return functional.relu(experts.up_proj[expert] @ token).square()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("name", "inner"), [("mixtral", swiglu), ("gpt_oss", gpt_oss), ("nemotron_h", squared_relu)])
def test_sums_inside_the_experts_equal_their_formulas(name: str, inner: Inner, implementation: str) -> None:
    moe = describe_moe(tiny_model(name).eval())
    moe.model.set_experts_implementation(implementation)
    names = list(WRITTEN_OUT)
    plain = run(moe)
    observer = ActivationObserver(moe, sums=names)
    assert torch.equal(run(moe), plain)
    observer.detach()
    assert_close(observer.read(), by_hand(moe, names, inner), names)


def test_without_being_asked_for_they_are_not_recorded() -> None:
    moe = describe_moe(tiny_model("mixtral").eval())
    observer = ActivationObserver(moe)
    run(moe)
    assert observer.read().sums == DEFAULT_SUMS


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_after_detach_and_after_an_error_nothing_is_left_on_the_model(name: str) -> None:
    moe = describe_moe(tiny_model(name).eval())

    def state() -> dict[str, Any]:
        return {
            path: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
            for path, module in moe.model.named_modules()
        }

    before = state()
    observer = ActivationObserver(moe, sums=visible(moe))
    block = next(iter(moe.blocks.values()))
    failure = block.experts.act_fn.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(moe)
    failure.remove()
    run(moe)
    observer.detach()
    assert state() == before


def test_an_unknown_sum_is_answered_with_the_known_ones() -> None:
    moe = describe_moe(tiny_model("mixtral").eval())
    with pytest.raises(SecateurError, match=r"sum 'gram': expected one of weight_sum, .*neuron_gram"):
        ActivationObserver(moe, sums=["gram"])
    assert "forward" not in vars(moe.blocks[0].experts)


@pytest.mark.parametrize(("name", "implementation"), [("dbrx", None), ("mixtral", "eager")])
@pytest.mark.parametrize("sum_name", ["neuron_square_sum", "neuron_gram"])
def test_experts_that_hide_their_inside_are_refused_before_they_run(
    name: str, implementation: str | None, sum_name: str
) -> None:
    moe = describe_moe(tiny_model(name).eval())
    if implementation is not None:
        moe.model.set_experts_implementation(implementation)
    with pytest.raises(SecateurError, match=r"s\.0\..*experts: the activations in front of the down projection"):
        ActivationObserver(moe, sums=[sum_name])


def test_experts_that_begin_to_hide_their_inside_are_refused_by_name() -> None:
    moe = describe_moe(tiny_model("mixtral").eval())
    ActivationObserver(moe, sums=["neuron_gram"])
    moe.model.set_experts_implementation("eager")
    with pytest.raises(
        SecateurError, match=r"layers\.0\.mlp\.experts: the activations in front of the down projection"
    ):
        run(moe)


def test_a_router_that_is_not_called_with_every_token_is_refused() -> None:
    moe = describe_moe(tiny_model("mixtral").eval())
    block = moe.blocks[0]
    observer = LayerObserver(block, sums=["input_gram"])
    observer.start()
    with torch.no_grad():
        block.experts(torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    message = r"layers\.0\.mlp\.experts: input_gram: the router was called as a module with 0 of 3 tokens"
    with pytest.raises(SecateurError, match=message):
        observer.read()


@pytest.mark.parametrize("kind", ["token choice", "few places"])
def test_image_models_show_outputs_and_what_their_routers_are_given(kind: str) -> None:
    model, images = tiny_vmoe(kind), random_images(3)
    moe = describe_moe(model)
    with torch.no_grad():
        plain = model(pixel_values=images).logits
    given: dict[int, Tensor] = {}
    handles = [
        block.router.register_forward_pre_hook(
            lambda module, args, layer=layer: given.update({layer: args[0].double()})
        )
        for layer, block in moe.blocks.items()
    ]
    observer = ActivationObserver(moe, sums=["output_sum", "input_square_sum", "input_gram"])
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, plain)
    observer.detach()
    for handle in handles:
        handle.remove()
    for layer, one in observer.read().layers.items():
        tokens = given[layer].reshape(-1, given[layer].shape[-1])
        assert one.num_tokens == len(tokens)
        torch.testing.assert_close(one.sums["input_gram"], tokens.T @ tokens)
        assert one.sums["output_sum"].shape == (8, 32)


def test_which_experts_a_token_has_together_is_not_seen_in_pairs() -> None:
    model = tiny_vmoe("few places")
    ActivationObserver(describe_moe(model), sums=["co_selection"])
    with pytest.raises(SecateurError, match=r"experts: called with pairs of token and expert that found a place"):
        model(pixel_values=random_images(2))
