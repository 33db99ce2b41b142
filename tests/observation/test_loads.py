"""Counting is exact, counts each real training token once, and never waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.observation.loads import LoadCounter
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from support.tiny_models import NUM_EXPERTS, TOP_K, every_family, random_plan, random_tokens, tiny_model

Ids = dict[int, list[list[list[int]]]]  # layer -> calls -> tokens -> experts


@contextmanager
def recorded_ids(moe: MoEModel) -> Iterator[Ids]:
    """The expert ids of every call of every `experts` module, in plain Python, taken where nothing of ours is."""
    ids: Ids = {layer: [] for layer in moe.blocks}
    handles = []
    for layer, block in moe.blocks.items():

        def record(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            found = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dtype == torch.int64]
            (index,) = found
            ids[layer].append(index.tolist())

        handles.append(block.experts.register_forward_pre_hook(record, with_kwargs=True))
    yield ids
    for handle in handles:
        handle.remove()


def recount(ids: Ids, num_experts: int, keep: list[int] | None = None) -> dict[int, list[int]]:
    """Tokens per expert; `keep` says for each token of the one call whether it counts."""
    loads = {}
    for layer, calls in ids.items():
        tokens = [token for call in calls for token in call]
        wanted = [token for i, token in enumerate(tokens) if keep is None or keep[i]]
        counter = Counter(expert for token in wanted for expert in token)
        loads[layer] = [counter[expert] for expert in range(num_experts)]
    return loads


@every_family
def test_counts_equal_a_recount_of_what_the_experts_were_called_with(name: str) -> None:
    moe = describe_moe(tiny_model(name).train())
    counter = LoadCounter(moe)
    tokens = random_tokens(2, 12)
    with recorded_ids(moe) as ids:
        moe.model(input_ids=tokens)
    stats = counter.read()
    assert stats.loads() == recount(ids, NUM_EXPERTS)
    assert all(one.num_tokens == 24 and int(one.token_count.sum()) == 24 * TOP_K for one in stats.layers.values())


def _softmax_choice(block: nn.Module, hidden: Tensor) -> Tensor:
    return (hidden @ block.gate.weight.T).topk(TOP_K).indices


def _biased_logits_choice(block: nn.Module, hidden: Tensor) -> Tensor:
    return (hidden @ block.router.weight.T + block.router.bias).topk(TOP_K).indices


def _sigmoid_choice(block: nn.Module, hidden: Tensor) -> Tensor:
    scores = (hidden @ block.gate.weight.T).sigmoid() + block.gate.e_score_correction_bias
    return scores.topk(TOP_K).indices


def _grouped_choice(block: nn.Module, hidden: Tensor) -> Tensor:
    """DeepSeek-V3, arXiv 2412.19437 section 2.1.2, with two groups of which the better one is used."""
    scores = (hidden @ block.gate.weight.T).sigmoid() + block.gate.e_score_correction_bias
    groups = scores.reshape(len(hidden), 2, NUM_EXPERTS // 2)
    best = groups.topk(2).values.sum(-1).argmax(-1)
    return groups[torch.arange(len(hidden)), best].topk(TOP_K).indices + best[:, None] * (NUM_EXPERTS // 2)


FORMULAS = {
    "mixtral": _softmax_choice,
    "qwen3_moe": _softmax_choice,
    "gpt_oss": _biased_logits_choice,
    "deepseek_v3": _sigmoid_choice,
    "deepseek_v3 grouped": _grouped_choice,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_equal_the_routing_formula_of_the_family(name: str) -> None:
    moe = describe_moe(tiny_model(name).train())
    counter = LoadCounter(moe)
    hidden: dict[int, Tensor] = {}
    for layer, block in moe.blocks.items():
        block.block.register_forward_pre_hook(
            lambda module, args, layer=layer: hidden.update({layer: args[0].detach().reshape(-1, 32)})
        )
    moe.model(input_ids=random_tokens(2, 12))
    for layer, block in moe.blocks.items():
        with torch.no_grad():
            chosen = FORMULAS[name](block.block, hidden[layer])
        expected = torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS)
        assert torch.equal(counter.read().layers[layer].token_count, expected)


def test_micro_batches_of_an_accumulated_step_add_up() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    parts = [random_tokens(2, 8, seed=1), random_tokens(3, 5, seed=2)]
    counter = LoadCounter(moe)
    separate = []
    for tokens in parts:
        counter.reset(moe)
        moe.model(input_ids=tokens, labels=tokens).loss.backward()
        separate.append(counter.read())
    counter.reset(moe)
    for tokens in parts:
        moe.model(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.read() == separate[0] + separate[1]
    assert counter.read().layers[0].num_tokens == 16 + 15


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_gradient_checkpointing_counts_once(name: str, reentrant: bool) -> None:
    tokens = random_tokens(2, 8)
    moe = describe_moe(tiny_model(name).train())
    counter = LoadCounter(moe)
    moe.model(input_ids=tokens, labels=tokens).loss.backward()
    expected = counter.read()
    counter.reset(moe)
    moe.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    moe.model.enable_input_require_grads()
    with recorded_ids(moe) as ids:
        moe.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(len(calls) == 2 for calls in ids.values()), "nothing was computed again, so this test could not fail"
    assert counter.read() == expected


def padding(side: str) -> Tensor:
    mask = torch.ones(3, 10, dtype=torch.int64)
    for row, missing in enumerate((0, 3, 7)):
        if missing:
            mask[row, -missing:] = 0
    return mask if side == "right" else mask.flip(1)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_is_not_counted(name: str, side: str, dtype: torch.dtype) -> None:
    moe = describe_moe(tiny_model(name).train())
    counter = LoadCounter(moe)
    mask = padding(side)
    with recorded_ids(moe) as ids:
        moe.model(input_ids=random_tokens(3, 10), attention_mask=mask.to(dtype))
    stats = counter.read()
    assert stats.loads() == recount(ids, NUM_EXPERTS, keep=mask.flatten().tolist())
    assert stats.loads() != recount(ids, NUM_EXPERTS)
    assert stats.layers[1].num_tokens == 20


CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "keywords": lambda model, tokens, mask: model(input_ids=tokens, attention_mask=mask),
    "positions": lambda model, tokens, mask: model(tokens, mask),
    "embeddings": lambda model, tokens, mask: model(
        inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask
    ),
    "further keywords": lambda model, tokens, mask: model(
        input_ids=tokens, attention_mask=mask, labels=tokens, num_items_in_batch=torch.tensor(20)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_tokens_and_padding_are_found_however_the_model_is_called(call: str) -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    CALLS[call](moe.model, random_tokens(3, 10), padding("right"))
    assert counter.read().layers[0].num_tokens == 20
    assert int(counter.read().layers[0].token_count.sum()) == 20 * TOP_K


@pytest.mark.parametrize("shape", [(3, 1, 5, 10), (3, 12), (10,)])
def test_a_mask_from_which_padding_cannot_be_told_is_refused(shape: tuple[int, ...]) -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    LoadCounter(moe)
    with pytest.raises(SecateurError, match=r"attention_mask: expected shape \(3, 10\)"):
        moe.model(input_ids=random_tokens(3, 10), attention_mask=torch.ones(shape))


def test_forwards_in_evaluation_mode_are_not_counted() -> None:
    moe = describe_moe(tiny_model("mixtral").eval())
    counter = LoadCounter(moe)
    moe.model(input_ids=random_tokens(2, 8))
    moe.model.generate(random_tokens(1, 4), max_new_tokens=3)
    assert counter.is_empty
    with pytest.raises(SecateurError, match="no token was counted"):
        counter.read()
    moe.model.train()
    moe.model(input_ids=random_tokens(2, 8))
    expected = counter.read()
    moe.model.eval()
    moe.model(input_ids=random_tokens(2, 8, seed=5))
    assert counter.read() == expected


def test_an_error_in_a_forward_leaves_nothing_for_the_next() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    handle = moe.blocks[1].experts.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moe.model(input_ids=random_tokens(1, 8), attention_mask=torch.zeros(1, 8))
    handle.remove()
    counter.reset(moe)
    moe.blocks[1].block(torch.randn(1, 5, 32))  # a call of its own, to which the mask of before does not belong
    assert int(counter._counts[1].sum()) == 5 * TOP_K
    with torch.no_grad():
        moe.blocks[1].block(torch.randn(1, 5, 32))
    assert int(counter._counts[1].sum()) == 5 * TOP_K


def test_an_error_in_a_hook_before_ours_is_the_one_that_is_told(recwarn: pytest.WarningsRecorder) -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    for module in (moe.model, moe.model.base_model):
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)  # as FSDP has, where a rank is lost
        with pytest.raises(ZeroDivisionError):
            moe.model(input_ids=random_tokens(1, 8), labels=random_tokens(1, 8))
        handle.remove()
    assert not recwarn.list
    moe.model(input_ids=random_tokens(1, 8))
    assert counter.read().layers[0].num_tokens == 8


def test_after_detach_nothing_is_left_on_the_model() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    hooks = {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in moe.model.named_modules()}
    counter = LoadCounter(moe)
    moe.model(input_ids=random_tokens(2, 8))
    expected = counter.read()
    counter.detach()
    moe.model(input_ids=random_tokens(2, 8))
    assert counter.read() == expected
    after = {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in moe.model.named_modules()}
    assert after == hooks


def test_counting_does_not_change_outputs_or_gradients() -> None:
    tokens = random_tokens(2, 8)
    results = []
    for counted in (False, True):
        model = tiny_model("deepseek_v3").train()
        if counted:
            LoadCounter(describe_moe(model))
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        results.append([output.logits, *(parameter.grad for parameter in model.parameters())])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_counts_go_on_from_loaded_ones() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    moe.model(input_ids=random_tokens(2, 8, seed=1))
    first = counter.read()
    moe.model(input_ids=random_tokens(2, 8, seed=2))
    both = counter.read()
    other = describe_moe(tiny_model("mixtral").train())
    resumed = LoadCounter(other)
    resumed.load(first)
    other.model(input_ids=random_tokens(2, 8, seed=2))
    assert resumed.read() == both
    assert first != both


def test_after_a_pruning_the_new_numbering_is_counted() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    moe.model(input_ids=random_tokens(2, 8))
    moe = prune_model_(moe, random_plan(moe))
    counter.reset(moe)
    with recorded_ids(moe) as ids:
        moe.model(input_ids=random_tokens(2, 8))
    loads = counter.read().loads()
    assert {layer: len(one) for layer, one in loads.items()} == moe.counts
    assert all(loads[layer] == recount({layer: ids[layer]}, moe.counts[layer])[layer] for layer in moe.blocks)


def test_a_layer_that_never_ran_its_experts_is_an_error() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    moe.model.model.layers[1].mlp.forward = lambda hidden: hidden
    moe.model(input_ids=random_tokens(1, 4))
    with pytest.raises(SecateurError, match=r"layers \[1\] never ran their experts"):
        counter.read()


@pytest.mark.parametrize("ids", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), None])
def test_experts_that_are_called_in_another_way_are_refused(ids: Tensor | None) -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    LoadCounter(moe)
    experts = moe.blocks[0].experts
    moe.model.model.layers[0].mlp.forward = lambda hidden: experts(hidden, ids, None)
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.experts: expected to be called with"):
        moe.model(input_ids=random_tokens(1, 4))


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


# What the counter may do: fill, add, view and convert on the device. Not among them, each of which waits for the
# device or for the host: _local_scalar_dense (item, tolist, bool), nonzero, equal, lift_fresh (torch.tensor), copy_.
ON_DEVICE = {
    "aten::zeros", "aten::full", "aten::ones_like", "aten::sum", "aten::add", "aten::scatter_add_",
    "aten::view", "aten::unsqueeze", "aten::expand", "aten::clone", "aten::_unsafe_view", "aten::slice", "aten::alias",
    "aten::add_", "aten::ne", "aten::eq", "aten::bitwise_and", "aten::bitwise_not", "aten::cumprod", "aten::flip",
    "aten::gt", "aten::_to_copy", "aten::detach",
}  # fmt: skip


@pytest.mark.parametrize("padded", ["no", "mask", "labels"])
def test_counting_never_waits_for_the_device(padded: str) -> None:
    mask = padding("right") if padded == "mask" else None
    labels = random_tokens(3, 10) if padded == "labels" else None
    seen = []
    for counted in (False, True):
        moe = describe_moe(tiny_model("mixtral").train())
        moe.model.config.pad_token_id = 0
        if counted:
            LoadCounter(moe)
        with Operations() as operations:
            for _ in range(2):
                moe.model(input_ids=random_tokens(3, 10), attention_mask=mask, labels=labels, use_cache=False)
        seen.append(operations.seen)
    added = seen[1] - seen[0]
    assert added["aten::scatter_add_"] == 2 * len(moe.blocks)
    assert set(added) <= ON_DEVICE


def test_counts_are_right_for_plans_of_other_sizes_in_every_layer() -> None:
    moe = describe_moe(tiny_model("qwen3_moe").train())
    layers = {layer: LayerPlan(experts_before=8, order=tuple(range(8 - layer))) for layer in moe.blocks}
    moe = prune_model_(moe, Plan(layers=layers, criterion="test"))
    counter = LoadCounter(moe)
    moe.model(input_ids=random_tokens(2, 8))
    assert {layer: len(one) for layer, one in counter.read().loads().items()} == {0: 8, 1: 7, 2: 6}


def test_counting_follows_automatic_mixed_precision() -> None:
    moe = describe_moe(tiny_model("mixtral").train())
    counter = LoadCounter(moe)
    with recorded_ids(moe) as ids, torch.autocast("cpu", dtype=torch.bfloat16):
        moe.model(input_ids=random_tokens(2, 8))
    assert counter.read().loads() == recount(ids, NUM_EXPERTS)
