"""Observing sees what each expert really gives for the tokens routed to it, and changes no bit of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from secateur.criteria import CRITERIA
from secateur.criteria.score import score_layers
from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.observation import activations
from secateur.observation.activations import ActivationObserver, LayerObserver
from secateur.stats import DEFAULT_SUMS, SUMS, RouterStats
from support.tiny_models import NUM_EXPERTS, TOP_K, every_family, random_tokens, tiny_model

Calls = dict[
    int, list[tuple[Tensor, Tensor, Tensor]]
]  # layer -> (hidden (T, D), ids (T, K), gates (T, K)) of each call
Expert = Callable[[nn.Module, Tensor, int], Tensor]  # experts module, (D,) token, id -> (D,) output

# (experts implementation, type, tolerance); the grouped one knows no float64
SETTINGS = [
    ("grouped_mm", torch.float32, 1e-4),
    ("batched_mm", torch.float64, 1e-12),
    ("eager", torch.float64, 1e-12),
    ("grouped_mm", torch.bfloat16, 0.03),
    ("batched_mm", torch.bfloat16, 0.03),
    ("eager", torch.bfloat16, 0.03),
]


@contextmanager
def recorded_calls(moe: MoEModel) -> Iterator[Calls]:
    calls: Calls = {layer: [] for layer in moe.blocks}
    handles = []
    for layer, block in moe.blocks.items():

        def record(module: nn.Module, args: Any, layer: int = layer) -> None:
            hidden, index, gates = args
            calls[layer].append((hidden.reshape(len(index), -1), index, gates))

        handles.append(block.experts.register_forward_pre_hook(record))
    yield calls
    for handle in handles:
        handle.remove()


def one_by_one(experts: nn.Module, token: Tensor, expert: int) -> Tensor:
    """An expert's own plain forward for one token; dbrx takes tokens in a batch."""
    shape = (1, 1, -1) if type(experts).__name__ == "DbrxExperts" else (1, -1)
    forward = getattr(type(experts).forward, "__wrapped__", type(experts).forward)
    return forward(experts, token.reshape(shape), torch.tensor([[expert]]), torch.ones(1, 1).to(token)).flatten()


def swiglu(experts: nn.Module, token: Tensor, expert: int) -> Tensor:
    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
    return experts.down_proj[expert] @ (functional.silu(gate) * up)


def gpt_oss(experts: nn.Module, token: Tensor, expert: int) -> Tensor:
    both = token @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return inner @ experts.down_proj[expert] + experts.down_proj_bias[expert]


def squared_relu(experts: nn.Module, token: Tensor, expert: int) -> Tensor:
    return experts.down_proj[expert] @ functional.relu(experts.up_proj[expert] @ token).square()


@torch.no_grad()
def brute_force(
    moe: MoEModel, calls: Calls, keep: list[bool] | None = None, expert_of: Expert = one_by_one
) -> dict[int, dict[str, list[float]]]:
    """Every field of the statistics, by running each expert on each of its tokens alone."""
    stats = {}
    for layer, recorded in calls.items():
        found: dict[str, list[float]] = {name: [0.0] * moe.counts[layer] for name in ("token_count", *DEFAULT_SUMS)}
        for hidden, index, gates in recorded:
            for token in range(len(hidden)):
                if keep is not None and not keep[token]:
                    continue
                for expert, gate in zip(index[token].tolist(), gates[token].tolist(), strict=True):
                    output = expert_of(moe.blocks[layer].experts, hidden[token], expert).double()
                    norm = float(output.norm())
                    found["token_count"][expert] += 1
                    found["weight_sum"][expert] += gate
                    found["norm_sum"][expert] += norm
                    found["norm_square_sum"][expert] += norm**2
                    found["weighted_norm_sum"][expert] += gate * norm
                    found["max_activation"][expert] = max(found["max_activation"][expert], float(output.abs().max()))
        stats[layer] = found
    return stats


def assert_stats(stats: RouterStats, expected: dict[int, dict[str, list[float]]], rel: float = 1e-4) -> None:
    assert stats.layers.keys() == expected.keys()
    for layer, one in stats.layers.items():
        assert one.token_count.tolist() == expected[layer]["token_count"]
        assert list(one.sums) == list(DEFAULT_SUMS)
        for name, values in one.sums.items():
            assert values.tolist() == pytest.approx(expected[layer][name], rel=rel, abs=1e-9), (layer, name)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **further: Any) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **further).logits


def vivid(name: str) -> PreTrainedModel:
    """A tiny model in evaluation mode whose experts and gates differ much more than at initialisation."""
    model = tiny_model(name).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key or ".gate." in key or ".router." in key:
                parameter.mul_(5 + 5 * torch.rand(len(parameter)).reshape(-1, *(1,) * (parameter.ndim - 1)))
    return model


@every_family
def test_every_field_equals_experts_run_one_by_one_and_no_output_bit_changes(name: str) -> None:
    moe = describe_moe(vivid(name))
    tokens = random_tokens(2, 12)
    plain = logits(moe.model, tokens)
    observer = ActivationObserver(moe)
    with recorded_calls(moe) as calls:
        assert torch.equal(logits(moe.model, tokens), plain)
    stats = observer.read()
    assert_stats(stats, brute_force(moe, calls))
    assert all(one.num_tokens == 24 and int(one.token_count.sum()) == 24 * TOP_K for one in stats.layers.values())


@pytest.mark.parametrize(("name", "formula"), [("mixtral", swiglu), ("gpt_oss", gpt_oss), ("nemotron_h", squared_relu)])
def test_every_field_equals_the_formula_of_the_expert(name: str, formula: Expert) -> None:
    moe = describe_moe(vivid(name))
    observer = ActivationObserver(moe)
    with recorded_calls(moe) as calls:
        logits(moe.model, random_tokens(2, 12))
    assert_stats(observer.read(), brute_force(moe, calls, expert_of=formula))


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), SETTINGS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_every_experts_implementation_is_seen_and_keeps_its_bits(
    name: str, implementation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = vivid(name).to(dtype)
    model.set_experts_implementation(implementation)
    moe = describe_moe(model)
    tokens = random_tokens(2, 6)
    plain = logits(model, tokens)
    observer = ActivationObserver(moe)
    with recorded_calls(moe) as calls:
        assert torch.equal(logits(model, tokens), plain)
    assert_stats(observer.read(), brute_force(moe, calls), rel=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_padding_is_left_out(name: str, side: str) -> None:
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = mask[2, 1:] = 0
    mask = mask if side == "right" else mask.flip(1)
    moe = describe_moe(vivid(name))
    observer = ActivationObserver(moe)
    with recorded_calls(moe) as calls:
        logits(moe.model, random_tokens(3, 8), attention_mask=mask)
    stats = observer.read()
    assert_stats(stats, brute_force(moe, calls, keep=mask.flatten().bool().tolist()))
    assert {one.num_tokens for one in stats.layers.values()} == {14}


def test_what_padding_computes_does_not_matter_even_where_it_is_not_a_number() -> None:
    moe = describe_moe(vivid("mixtral"))
    block = moe.blocks[0]
    hidden = torch.randn(6, 32)
    index, gates = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    read = []
    for value in (0.0, float("nan")):
        hidden[4:] = value
        observer = LayerObserver(block)
        observer.start(torch.tensor([1, 1, 1, 1, 0, 0]))
        with torch.no_grad():
            block.experts(hidden, index, gates)
        observer.stop()
        read.append(observer.read())
        observer.detach()
    assert read[0] == read[1]
    assert read[0].token_count.tolist()[:3] == [4, 4, 0]


def test_batches_add_up_to_one_pass_over_all_tokens() -> None:
    moe = describe_moe(vivid("deepseek_v3"))
    tokens = random_tokens(4, 9)
    parts = []
    for part in (tokens, tokens[:1], tokens[1:]):
        observer = ActivationObserver(moe)
        logits(moe.model, part)
        parts.append(observer.read())
        observer.detach()
    whole, merged = parts[0], parts[1] + parts[2]
    both = ActivationObserver(moe)
    logits(moe.model, tokens[:1])
    logits(moe.model, tokens[1:])
    for other in (merged, both.read()):
        for layer, one in whole.layers.items():
            assert other.layers[layer].token_count.tolist() == one.token_count.tolist()
            for name, values in one.sums.items():
                assert other.layers[layer].sums[name].tolist() == pytest.approx(values.tolist(), rel=1e-5), name


def test_one_pass_serves_every_criterion_on_data() -> None:
    moe = describe_moe(vivid("mixtral"))
    observer = ActivationObserver(moe, sums=SUMS)
    logits(moe.model, random_tokens(2, 12))
    stats = observer.read()
    for name, criterion in CRITERIA.items():
        if criterion.needs_data:
            assert score_layers(name, moe.counts, stats=stats).keys() == moe.blocks.keys()


def test_no_expert_runs_on_a_token_that_was_not_routed_to_it() -> None:
    moe = describe_moe(vivid("mixtral"))
    rows: list[int] = []
    moe.blocks[0].experts.act_fn.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    ActivationObserver(moe)
    logits(moe.model, random_tokens(2, 12))
    assert rows == [24 * TOP_K]


def test_training_is_not_observed() -> None:
    moe = describe_moe(vivid("mixtral"))
    observer = ActivationObserver(moe)
    moe.model.train()
    logits(moe.model, random_tokens(2, 8))
    with pytest.raises(
        SecateurError, match=r"layers\.0\.mlp\.experts never ran while they were observed in evaluation"
    ):
        observer.read()
    moe.model.eval()
    logits(moe.model, random_tokens(2, 8))
    expected = observer.read()
    moe.model.train()
    logits(moe.model, random_tokens(2, 8, seed=3))
    assert observer.read() == expected


@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_after_detach_nothing_is_left_on_the_model(name: str) -> None:
    moe = describe_moe(vivid(name))

    def state() -> dict[str, Any]:
        return {
            path: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
            for path, module in moe.model.named_modules()
        }

    before = state()
    observer = ActivationObserver(moe)
    logits(moe.model, random_tokens(1, 8))
    expected = observer.read()
    observer.detach()
    assert state() == before
    assert not getattr(moe.blocks[0].experts, "has_post_expert_norm", False)
    logits(moe.model, random_tokens(1, 8))
    assert observer.read() == expected


def test_a_forward_that_was_set_on_the_module_is_called_and_comes_back() -> None:
    moe = describe_moe(vivid("mixtral"))
    experts = moe.blocks[0].experts
    original, calls = experts.forward, []

    def offloaded(*args: Any) -> Tensor:
        calls.append(len(args))
        return original(*args)

    experts.forward = offloaded
    observer = ActivationObserver(moe)
    logits(moe.model, random_tokens(1, 8))
    observer.detach()
    assert calls == [3]
    assert experts.forward is offloaded


def test_an_error_in_the_experts_leaves_them_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = describe_moe(vivid("mixtral"))
    experts = moe.blocks[1].experts
    observer = ActivationObserver(moe)
    failure = experts.act_fn.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(moe.model, random_tokens(1, 8))
    assert experts.has_post_expert_norm is False
    assert not hasattr(experts, "post_expert_norm")
    failure.remove()
    with torch.no_grad():
        moe.blocks[0].block(torch.randn(1, 8, 32))  # outside the model's forward
    assert observer.layers[0].read().num_tokens == 8


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_with_a_norm_of_their_own_are_observed_behind_it(implementation: str) -> None:
    moe = describe_moe(vivid("mixtral"))
    moe.model.set_experts_implementation(implementation)
    tokens = random_tokens(1, 8)
    results = []
    for normed in (False, True):
        experts = moe.blocks[2].experts  # the last layer, so that nothing before it changes
        if normed:
            experts.has_post_expert_norm, experts.post_expert_norm = True, Norm()
        plain = logits(moe.model, tokens)
        observer = ActivationObserver(moe)
        assert torch.equal(logits(moe.model, tokens), plain)
        results.append(observer.read().layers[2])
        observer.detach()
        assert isinstance(getattr(experts, "post_expert_norm", None), Norm) is normed
        assert experts.has_post_expert_norm is normed
    for name, factor in (("norm_sum", 3), ("norm_square_sum", 9), ("weight_sum", 1), ("max_activation", 3)):
        before, after = (one.sums[name].tolist() for one in results)
        assert after == pytest.approx([factor * value for value in before], rel=1e-5), name


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_norms_of_narrow_outputs_are_taken_and_added_up_wide() -> None:
    model = vivid("mixtral").to(torch.bfloat16)
    experts = describe_moe(model).blocks[0].experts
    experts.has_post_expert_norm, experts.post_expert_norm = True, Ones()
    observer = LayerObserver(describe_moe(model).blocks[0])
    observer.start()
    with torch.no_grad():
        experts(torch.ones(999, 32, dtype=torch.bfloat16), torch.tensor([[0, 1]] * 999), torch.full((999, 2), 0.5))
    stats = observer.read()
    norm = float(torch.tensor(32.0).sqrt())  # of 32 ones, in float32: bfloat16 has 5.65625, float32 sums lose digits
    assert stats.sums["norm_sum"][:2].tolist() == pytest.approx([999 * norm] * 2, rel=1e-12)
    assert stats.sums["weighted_norm_sum"][:2].tolist() == pytest.approx([999 * norm / 2] * 2, rel=1e-12)


@pytest.mark.parametrize(("factor", "is_noticed"), [(1.01, False), (1.05, True)])
def test_outputs_that_miss_a_fiftieth_of_the_layers_output_are_noticed(factor: float, is_noticed: bool) -> None:
    block = describe_moe(vivid("mixtral")).blocks[0]
    original = block.experts.forward
    block.experts.forward = lambda *args: factor * original(*args)
    observer = LayerObserver(block)
    observer.start()
    message = "the observed outputs do not add up" if is_noticed else None
    with torch.no_grad(), pytest.raises(SecateurError, match=message) if message else nullcontext():
        block.experts(torch.randn(6, 32), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5))


def test_rows_in_another_order_than_expected_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = describe_moe(vivid("mixtral"))
    monkeypatch.setitem(activations.ROWS, "grouped_mm", activations.ROWS["batched_mm"])
    ActivationObserver(moe)
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.experts: the observed outputs do not add up.*grouped_mm"):
        logits(moe.model, random_tokens(2, 8))


def test_an_experts_function_that_shows_nothing_is_run_slot_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = describe_moe(vivid("mixtral"))
    moe.model.set_experts_implementation("eager")
    monkeypatch.setitem(activations.ROWS, "eager", activations.ROWS["grouped_mm"])
    observer = ActivationObserver(moe)
    with recorded_calls(moe) as calls:
        logits(moe.model, random_tokens(2, 8))
    assert_stats(observer.read(), brute_force(moe, calls))


def test_gradients_are_those_of_the_plain_model() -> None:
    for implementation in ("grouped_mm", "eager"):
        results = []
        for observed in (False, True):
            moe = describe_moe(vivid("mixtral"))
            moe.model.set_experts_implementation(implementation)
            if observed:
                ActivationObserver(moe)
            moe.model(input_ids=random_tokens(2, 8), labels=random_tokens(2, 8)).loss.backward()
            results.append([parameter.grad for parameter in moe.model.parameters()])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_observers_at_once_are_refused() -> None:
    moe = describe_moe(vivid("mixtral"))
    ActivationObserver(moe)
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.experts are observed already"):
        ActivationObserver(moe)


def test_experts_split_over_ranks_are_refused() -> None:
    moe = describe_moe(vivid("mixtral"))
    moe.blocks[1].experts._is_expert_parallel = True
    with pytest.raises(SecateurError, match=r"layers\.1\.mlp\.experts are split over ranks"):
        ActivationObserver(moe)
    assert "forward" not in vars(moe.blocks[0].experts), "a refusal left the first layer observed"


def test_outputs_that_are_not_numbers_are_an_error_that_names_layer_field_and_expert() -> None:
    moe = describe_moe(vivid("mixtral"))
    with torch.no_grad():
        moe.blocks[1].experts.down_proj[5] = float("nan")
    observer = ActivationObserver(moe)
    logits(moe.model, random_tokens(4, 12))
    with pytest.raises(SecateurError, match=r"layers\.1\.mlp\.experts: norm_sum of expert 5 is nan"):
        observer.layers[1].read()


@pytest.mark.parametrize("gates", [None, torch.ones(4, 1), torch.ones(4, 2, dtype=torch.int64)])
def test_experts_that_are_called_without_gates_are_refused(gates: Tensor | None) -> None:
    moe = describe_moe(vivid("mixtral"))
    observer = ActivationObserver(moe)
    observer.layers[0].start()
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.experts: expected gates of shape \(4, 2\)"):
        moe.blocks[0].experts(torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.int64), gates)


def test_a_mask_of_another_number_of_tokens_is_refused() -> None:
    moe = describe_moe(vivid("mixtral"))
    observer = LayerObserver(moe.blocks[0])
    observer.start(torch.ones(5))
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.experts: ran on 3 tokens, but the mask has 5"):
        moe.blocks[0].experts(torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))


def test_a_never_routed_expert_has_only_zeros() -> None:
    moe = describe_moe(vivid("mixtral"))
    observer = LayerObserver(moe.blocks[0])
    observer.start()
    with torch.no_grad():
        moe.blocks[0].experts(torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    stats = observer.read()
    assert stats.token_count.tolist() == [3, 3] + [0] * (NUM_EXPERTS - 2)
    assert all(values[2:].tolist() == [0] * (NUM_EXPERTS - 2) for values in stats.sums.values())
