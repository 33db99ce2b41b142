"""LAEP in a script that works already: what it calls when, what it wraps and copies, and what it tells of padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.train import laep as laep_module
from secateur.train.laep import LAEP
from support.small_trainers import same_weights, wrap_in_checkpoints
from support.tiny_models import random_tokens, tiny_model

MICRO_BATCHES = 3


def pruner_of(model: Any, optimizer: torch.optim.Optimizer, **settings: Any) -> LAEP:
    return LAEP(model, optimizer, **{"at_step": 2, "alpha": 0.9, "window_steps": 2, **settings})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def accumulated(often: bool) -> tuple[nn.Module, LAEP]:
    """Four optimizer steps of three micro-batches; LAEP's step after each of them, or after the optimizer's alone."""
    model = tiny_model("mixtral").train()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    for index in range(4 * MICRO_BATCHES):
        tokens = random_tokens(2, 8, seed=index)
        (model(input_ids=tokens, labels=tokens).loss / MICRO_BATCHES).backward()
        steps = index % MICRO_BATCHES == MICRO_BATCHES - 1
        if steps:
            optimizer.step()
        if often or steps:
            pruner.step()
        if steps:
            optimizer.zero_grad()
    return model, pruner


def test_a_call_after_each_micro_batch_waits_for_the_step_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laep_module, "MAX_WAITS", MICRO_BATCHES)  # in a row, which a step ends
    (model, pruner), (expected, other) = accumulated(often=True), accumulated(often=False)
    assert [event.step for event in pruner.events] == [2]
    assert pruner.num_steps == other.num_steps == 4
    assert pruner.events[0].loads == other.events[0].loads
    assert same_weights(model, expected)


def test_calls_without_any_step_of_an_optimizer_end_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laep_module, "MAX_WAITS", 5)
    model = tiny_model("mixtral").train()
    said: list[str] = []
    pruner = pruner_of(model, sgd(model), on_message=said.append)
    tokens = random_tokens(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for _ in range(4):
        assert pruner.step() is None
    with pytest.raises(SecateurError, match=r"5 calls of LAEP\.step\(\).*no optimizer that LAEP was given has stepped"):
        pruner.step()
    pruner.finish()
    assert said[0].startswith("5 calls of LAEP.step(), but no optimizer")


def test_a_second_laep_is_refused_until_the_first_has_ended() -> None:
    model = tiny_model("mixtral").train()
    first = pruner_of(model, sgd(model))
    for settings in ({}, {"prunings": [], "at_step": None, "alpha": None}):
        with pytest.raises(SecateurError, match=r"watched by another LAEP.*finish\(\) or detach\(\)"):
            pruner_of(model, sgd(model), **settings)
    first.finish()
    pruner_of(model, sgd(model)).detach()


def test_a_copy_of_the_model_takes_neither_laep_nor_the_optimizer_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral").train()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)

    def refuse(self: Any, memo: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} was copied")

    for one in (LAEP, torch.optim.SGD):
        monkeypatch.setattr(one, "__deepcopy__", refuse, raising=False)
    average = copy.deepcopy(model)
    tokens = random_tokens(2, 8)
    average(input_ids=tokens, labels=tokens).loss.backward()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    event = pruner.step()
    assert event is not None
    assert event.tokens == 2 * 16
    assert set(describe_moe(average).counts.values()) == {8}


def compiled_before(model: Any) -> None:
    model.compile(backend="eager")


def layer_compiled(model: Any) -> None:
    model.model.layers[1].compile(backend="eager")


def layer_replaced(model: Any) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def experts_replaced(model: Any) -> None:
    model.model.layers[1].mlp.experts = torch.compile(model.model.layers[1].mlp.experts, backend="eager")


def forward_replaced(model: Any) -> None:
    model.model.forward = torch.compile(model.model.forward, backend="eager")


COMPILED = [compiled_before, layer_compiled, layer_replaced, experts_replaced, forward_replaced]


@pytest.mark.parametrize("compile_", COMPILED)
@pytest.mark.parametrize("counts_only", [False, True])
def test_a_model_that_is_compiled_in_any_part_is_refused_at_the_start(compile_: Any, counts_only: bool) -> None:
    model = tiny_model("mixtral").train()
    compile_(model)
    settings = {"prunings": [], "at_step": None, "alpha": None} if counts_only else {}
    with pytest.raises(SecateurError, match=r"compiled"):
        pruner_of(model, sgd(model), **settings)


@pytest.mark.parametrize("compile_", COMPILED)
def test_a_model_that_is_compiled_later_is_refused_at_the_first_step(compile_: Any) -> None:
    model = tiny_model("mixtral").train()
    pruner = pruner_of(model, sgd(model))
    compile_(model)
    with pytest.raises(SecateurError, match="compiled"):
        pruner.step()


@pytest.mark.parametrize("place", ["layers", "mlp", "experts"])
@pytest.mark.parametrize("later", [False, True])
def test_wrappers_of_activation_checkpointing_change_neither_pruning_nor_training(place: str, later: bool) -> None:
    expected, _ = trained(None, later=False)
    model, pruner = trained(place, later=later)
    assert [event.step for event in pruner.events] == [2]
    assert pruner.events[0].oracle_max_abs_difference == 0
    weights = {name.replace("_checkpoint_wrapped_module.", ""): one for name, one in model.state_dict().items()}
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], one) for name, one in expected.state_dict().items())
    assert type(model).__name__ == "PrunedMixtralForCausalLM"


def trained(place: str | None, *, later: bool) -> tuple[Any, LAEP]:
    model: Any = tiny_model("mixtral").train()
    if place and not later:
        wrap_in_checkpoints(model, place)
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    if place and later:
        wrap_in_checkpoints(model, place)
    for index in range(4):
        tokens = random_tokens(2, 8, seed=index)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return model, pruner


# What LAEP says of padding


def sft_batch(index: int) -> dict[str, Tensor]:
    """Rows padded with 0 to the longest, labels -100 there, no attention mask."""
    tokens = random_tokens(4, 10, seed=index).clamp(min=1)
    labels = tokens.clone()
    for row, words in enumerate((10, 7, 4, 2)):
        tokens[row, words:], labels[row, words:] = 0, -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("knows", [True, False])
def test_padding_without_a_mask_is_left_out_or_named_once(knows: bool) -> None:
    model = tiny_model("mixtral").train()
    model.config.pad_token_id = 0 if knows else None
    optimizer = sgd(model)
    said: list[str] = []
    pruner = pruner_of(model, optimizer, at_step=None, at_tokens=10**9, window_steps=1, on_message=said.append)
    for index in range(3):
        model(**sft_batch(index)).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.num_tokens == 3 * (23 if knows else 40)
    expected = [] if knows else ["42.5% of the tokens that count as load may be padding"]
    assert [line.partition(":")[0] for line in said] == expected


def test_what_is_marked_as_uncounted_is_not_counted() -> None:
    model = tiny_model("mixtral").train()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, at_step=None, at_tokens=10**9, window_steps=1)
    tokens = random_tokens(2, 8)
    with pruner.uncounted():
        model(input_ids=tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    pruner.step()
    assert pruner.num_tokens == 16
