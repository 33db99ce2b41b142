"""Which forwards and which tokens count as load: those that train, once each, whatever the script does around them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.observation.loads import LoadCounter
from secateur.observation.real_tokens import at_the_ends, real_by_mask
from secateur.stats import RouterStats
from secateur.train.balance import attach_balance
from secateur.train.distributed.ddp import DDPFinder
from support.small_trainers import wrap_in_checkpoints
from support.tiny_models import TOP_K, random_tokens, tiny_model

TOKENS = random_tokens(2, 8)


def counted(use: Callable[[PreTrainedModel], Any], name: str = "mixtral", **counter: Any) -> RouterStats:
    """What is counted of a model in training mode."""
    model = tiny_model(name).train()
    one = LoadCounter(describe_moe(model), **counter)
    use(model)
    return one.read()


def plain(model: Any) -> None:
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


EXPECTED = counted(plain)


# Forwards


def generated(model: Any) -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model.generate(random_tokens(2, 4), attention_mask=left, max_new_tokens=3, do_sample=False)
    plain(model)
    settings = {"max_new_tokens": 3, "cache_implementation": "static", "disable_compile": True}
    model.generate(random_tokens(2, 4), attention_mask=left, do_sample=False, **settings)


def with_a_reference_pass(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=random_tokens(2, 8, seed=5))
    plain(model)


def after_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model(input_ids=random_tokens(2, 8, seed=5))
    plain(model)


def own_loss_on_the_model_below_the_head(model: Any) -> None:
    model.model(input_ids=TOKENS).last_hidden_state.square().mean().backward()


def forward_as_a_function(model: Any) -> None:
    model.model.forward(input_ids=TOKENS).last_hidden_state.square().mean().backward()


def layers_in_checkpoints_below_a_forward_as_a_function(model: Any) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})
    forward_as_a_function(model)


def in_a_checkpoint(reentrant: bool, layers: bool) -> Callable[[Any], None]:
    def use(model: Any) -> None:
        if layers:
            model.activation_checkpointing_enable({"use_reentrant": False})
        anchor = torch.zeros((), requires_grad=True)  # a reentrant checkpoint wants one input with a gradient

        def run(tokens: Tensor, anchor: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss + anchor  # type: ignore[no-any-return]

        checkpoint(run, TOKENS, anchor, use_reentrant=reentrant).backward()

    return use


USES: dict[str, Callable[[Any], None]] = {
    "generated": generated,
    "reference pass": with_a_reference_pass,
    "inference mode": after_inference_mode,
    "own loss": own_loss_on_the_model_below_the_head,
    "forward as a function": forward_as_a_function,
    "the same, layers in checkpoints": layers_in_checkpoints_below_a_forward_as_a_function,
    "checkpoint": in_a_checkpoint(False, False),
    "checkpoint, and of layers": in_a_checkpoint(False, True),
    "reentrant checkpoint": in_a_checkpoint(True, False),
    "reentrant checkpoint, and of layers": in_a_checkpoint(True, True),
}


@pytest.mark.parametrize("use", USES)
def test_each_training_token_counts_once_and_no_other(use: str) -> None:
    assert counted(USES[use]) == EXPECTED


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_counts_every_micro_batch_and_step(reentrant: bool) -> None:
    model = tiny_model("mixtral").train()
    counter = LoadCounter(describe_moe(model))
    for _ in range(3):
        in_a_checkpoint(reentrant, layers=False)(model)
    assert counter.read() == EXPECTED + EXPECTED + EXPECTED


def test_a_block_that_is_not_to_be_counted_is_not() -> None:
    model = tiny_model("mixtral").train()
    counter = LoadCounter(describe_moe(model))
    with counter.paused():
        plain(model)
        forward_as_a_function(model)
    assert counter.is_empty
    plain(model)
    assert counter.read() == EXPECTED


# Copies


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - made here


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _pickled, _saved])
def test_a_copy_of_the_model_is_a_plain_one(make: Callable[[Any], Any]) -> None:
    model = tiny_model("mixtral").train()
    moe = describe_moe(model)
    counter = LoadCounter(moe)
    finder, balance = DDPFinder(model), attach_balance(model, "mixtral", blocks=moe.blocks)
    other = make(model)
    finder.detach()
    balance.detach()
    plain(other)
    assert counter.is_empty
    plain(model)
    assert counter.read() == EXPECTED
    hooks = [
        hook
        for module in other.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    assert hooks
    assert {getattr(hook, "__module__", "") for hook in hooks} == {"contextlib"}


# Tokens: masks


def test_numbers_of_packed_segments_are_real_tokens_whatever_the_number() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0], [1, 2, 2, 2, 2, 0, 0, 0]])
    stats = counted(lambda model: model(input_ids=TOKENS, attention_mask=segments))
    assert stats.layers[0].num_tokens == 12
    assert int(stats.layers[0].token_count.sum()) == 12 * TOP_K


# three rows of 1, 3 and 4 real tokens, padded on the right and on the left
REAL = {
    "right": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool),
    "left": torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool),
}
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def _attends(real: Tensor) -> Tensor:
    return (CAUSAL & real[:, None, :])[:, None]  # (B, 1, S, S)


def _added(real: Tensor, dtype: torch.dtype, lowest: float) -> Tensor:
    return torch.zeros(_attends(real).shape, dtype=dtype).masked_fill(~_attends(real), lowest)


MASKS: dict[str, Callable[[Tensor], Any]] = {
    "bool": _attends,
    "added": lambda real: _added(real, torch.float32, torch.finfo(torch.float32).min),
    "added, bfloat16": lambda real: _added(real, torch.bfloat16, torch.finfo(torch.bfloat16).min),
    "added, infinite": lambda real: _added(real, torch.float32, float("-inf")),
    "by the kind of attention": lambda real: {"full_attention": _attends(real), "sliding_attention": _attends(real)},
    "by the kind, one of them none": lambda real: {"sliding_attention": None, "full_attention": _attends(real)},
}


@pytest.mark.parametrize("side", REAL)
@pytest.mark.parametrize("mask", MASKS)
def test_a_token_that_may_not_attend_to_itself_is_padding(mask: str, side: str) -> None:
    found = real_by_mask(MASKS[mask](REAL[side]), torch.zeros(3, 4))
    assert found is not None
    assert torch.equal(found, REAL[side])


def test_masks_that_have_nothing_to_say() -> None:
    tokens = torch.zeros(3, 4)
    assert real_by_mask(None, tokens) is None
    assert real_by_mask({"full_attention": None}, tokens) is None
    one_for_all = real_by_mask(CAUSAL[None, None], tokens)
    assert one_for_all is not None
    assert torch.equal(one_for_all, torch.ones(3, 4, dtype=torch.bool))


def test_a_model_counts_by_a_mask_of_its_own_making() -> None:
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 5:] = False
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    by_two = counted(lambda model: model(input_ids=TOKENS, attention_mask=real.long()))
    by_four = counted(lambda model: model(input_ids=TOKENS, attention_mask=(causal & real[:, None, :])[:, None]))
    assert by_four == by_two
    assert by_four.layers[0].num_tokens == 13
    by_kind = {"full_attention": (causal & real[:, None, :])[:, None], "sliding_attention": None}
    gpt = counted(lambda model: model(input_ids=TOKENS, attention_mask=by_kind), "gpt_oss")
    assert gpt.layers[0].num_tokens == 13


def test_a_mask_over_a_cache_is_read_at_its_end() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])

    four = (torch.ones(3, 6, dtype=torch.bool).tril(3) & mask[:, None, :].bool())[:, None]

    def use(mask: Tensor) -> Callable[[Any], None]:
        def call(model: Any) -> None:
            with torch.no_grad():
                past = model(input_ids=random_tokens(2, 3), use_cache=True).past_key_values
            model(input_ids=random_tokens(2, 3, seed=1), past_key_values=past, attention_mask=mask)

        return call

    assert counted(use(mask)).layers[0].num_tokens == 5
    assert counted(use(four)).layers[0].num_tokens == 5


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 8, 4), object(), torch.ones(16)])
def test_a_mask_that_does_not_tell_is_refused_at_the_first_forward_but_not_where_nothing_is_counted(mask: Any) -> None:
    model = tiny_model("mixtral").train()
    counter = LoadCounter(describe_moe(model))
    with pytest.raises(SecateurError, match=r"attention_mask: expected shape \(2, 8\).*count_mask"):
        model(input_ids=TOKENS, attention_mask=mask)
    assert counter.is_empty


def test_count_mask_decides() -> None:
    seen: list[Any] = []

    def every_second(given: Any) -> Tensor:
        seen.append({name: value for name, value in given.items() if name in ("input_ids", "labels")})
        return torch.tensor([0, 1]).repeat(4).expand(2, 8)

    stats = counted(plain, count_mask=every_second)
    assert stats.layers[0].num_tokens == 8
    assert torch.equal(seen[0]["input_ids"], TOKENS)
    assert torch.equal(seen[0]["labels"], TOKENS)
    assert counted(plain, count_mask=lambda given: None) == EXPECTED
    with pytest.raises(SecateurError, match=r"count_mask returned \(8,\), expected \(2, 8\)"):
        counted(plain, count_mask=lambda given: torch.ones(8))


# Tokens: labels


def padded_batch(pad: int) -> tuple[Tensor, Tensor]:
    """Two rows of 3 and 6 words, of which the first has no target, and one word is the pad id; padded to 8."""
    tokens = torch.full((2, 8), pad)
    tokens[0, :3], tokens[1, :6] = torch.tensor([5, 6, 7]), torch.tensor([5, 6, pad, 7, 8, 9])
    labels = tokens.clone()
    labels[0, 3:], labels[1, 6:] = -100, -100
    labels[:, 0] = -100
    labels[1, 2] = -100  # a pad id without a target, in the middle of a text
    return tokens, labels


def counter_with_pad(pad: int | None) -> tuple[Any, LoadCounter]:
    model = tiny_model("mixtral").train()
    model.config.pad_token_id = pad
    return model, LoadCounter(describe_moe(model))


@pytest.mark.parametrize("call", ["keywords", "positions", "through a caller"])
def test_padding_that_only_labels_and_the_pad_id_show_is_not_counted(call: str) -> None:
    tokens, labels = padded_batch(2)
    model = tiny_model("mixtral").train()
    model.config.pad_token_id = 2
    outer = Caller(model)
    counter = LoadCounter(describe_moe(model), callers=[outer])
    if call == "keywords":
        model(input_ids=tokens, labels=labels)
    elif call == "positions":
        model(tokens, None, None, None, None, labels)
    else:
        outer(tokens, labels=labels)
    assert counter.read().layers[0].num_tokens == 3 + 6
    assert counter.doubtful_share() == 0


class Caller(nn.Module):
    """Calls the model below the head, and makes the loss itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model.model(input_ids=tokens).last_hidden_state  # type: ignore[no-any-return]


def test_the_pad_id_with_a_target_at_the_end_of_a_row_is_a_word() -> None:
    tokens, labels = padded_batch(2)
    tokens[1, 6:], labels[1, 6:] = 2, 2  # a text that ends twice
    model, counter = counter_with_pad(2)
    model(input_ids=tokens, labels=labels)
    assert counter.read().layers[0].num_tokens == 3 + 8


def test_labels_say_more_than_a_mask_of_four_dimensions() -> None:
    tokens, labels = padded_batch(2)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 0] = False  # the mask bars one token, and lets the padding attend to itself
    mask = (torch.ones(8, 8, dtype=torch.bool).tril() & real[:, None, :])[:, None]
    model, counter = counter_with_pad(2)
    model(input_ids=tokens, labels=labels, attention_mask=mask)
    assert counter.read().layers[0].num_tokens == 2 + 6


def test_labels_of_rows_say_nothing_of_tokens() -> None:
    tokens, _ = padded_batch(2)
    model, counter = counter_with_pad(2)
    outer = Caller(model)
    counter.detach()
    counter = LoadCounter(describe_moe(model), callers=[outer])
    outer(tokens, labels=torch.tensor([0, -100]))
    assert counter.read().layers[0].num_tokens == 16
    assert counter.doubtful_share() == 7 / 16


def test_without_a_pad_id_the_share_of_tokens_without_a_target_is_told() -> None:
    tokens, labels = padded_batch(2)
    model, counter = counter_with_pad(None)
    model(input_ids=tokens, labels=labels)
    assert counter.read().layers[0].num_tokens == 16
    model(input_ids=tokens, labels=tokens)
    assert counter.doubtful_share() == (labels == -100).sum() / 32 == 10 / 32
    assert counter.doubtful_share() == 0, "told once"


def test_without_labels_the_share_of_pad_ids_at_the_ends_of_rows_is_told() -> None:
    tokens, _ = padded_batch(2)
    model, counter = counter_with_pad(2)
    model(input_ids=tokens)
    assert counter.read().layers[0].num_tokens == 16
    assert counter.doubtful_share() == 7 / 16


def test_with_a_mask_labels_say_nothing() -> None:
    tokens, labels = padded_batch(2)
    model, counter = counter_with_pad(2)
    model(input_ids=tokens, labels=labels, attention_mask=torch.ones(2, 8))
    assert counter.read().layers[0].num_tokens == 16
    assert counter.doubtful_share() == 0


def test_runs_at_the_ends_of_rows() -> None:
    flags = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert at_the_ends(flags).int().tolist() == [[1, 1, 0, 0, 0, 1], [0] * 6, [1] * 6]


# Wrappers


@pytest.mark.parametrize("place", ["layers", "mlp", "experts"])
def test_a_model_in_wrappers_of_activation_checkpointing_is_counted(place: str) -> None:
    model: Any = tiny_model("mixtral").train()
    wrap_in_checkpoints(model, place)
    counter = LoadCounter(describe_moe(model))
    plain(model)
    assert counter.read() == EXPECTED
