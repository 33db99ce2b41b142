"""One reader understands every call of an `experts` module, and what it makes of a call keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from secateur import modeling_secateur
from secateur.errors import SecateurError
from secateur.modeling_secateur import skipping_class
from secateur.observation.call import CALL, read_call, read_index

NUM_SLOTS, KEPT = 6, (4, 0, 3)
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(9, 8, generator=GENERATOR)
INDEX = torch.stack([torch.randperm(NUM_SLOTS, generator=GENERATOR)[:2] for _ in HIDDEN])
GATES = torch.rand(9, 2, generator=GENERATOR)


def experts_of(implementation: str, num_experts: int, dtype: torch.dtype = torch.float32) -> Any:
    config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=num_experts)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return experts.to(dtype)


def forms() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The same call by places, by names, and by both."""
    return [
        ((HIDDEN, INDEX, GATES), {}),
        ((HIDDEN,), {"top_k_index": INDEX, "top_k_weights": GATES}),
        ((), {"hidden_states": HIDDEN, "selected_experts": INDEX, "routing_weights": GATES}),
        ((HIDDEN, INDEX), {"routing_weights": GATES, "more": 1}),
    ]


def test_the_file_that_is_copied_beside_results_knows_the_same_names() -> None:
    assert modeling_secateur.CALL == CALL


@pytest.mark.parametrize(("args", "kwargs"), forms())
def test_a_call_is_read_in_every_form_and_given_back_with_other_ids_in_the_same(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    call = read_call("experts", args, kwargs)
    assert (call.hidden is HIDDEN, call.index is INDEX, call.gates is GATES) == (True, True, True)
    other = INDEX.flip(0)
    new_args, new_kwargs = call.with_index(other)
    assert len(new_args) == len(args)
    assert list(new_kwargs) == list(kwargs)
    changed = [(a, b) for a, b in zip((*args, *kwargs.values()), (*new_args, *new_kwargs.values()), strict=True)]
    assert [b is other for a, b in changed] == [a is INDEX for a, _ in changed]
    assert all(a is b for a, b in changed if a is not INDEX)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((HIDDEN,), r"layer 3: expected to be called with \(hidden, expert ids .*, found NoneType as the ids"),
        ((HIDDEN, GATES, INDEX), r"found torch.float32 \(9, 2\) as the ids"),
        ((HIDDEN, INDEX[0], GATES), r"found torch.int64 \(2,\) as the ids"),
        ((HIDDEN, INDEX), r"layer 3: expected gates of shape \(9, 2\), found NoneType"),
        ((HIDDEN, INDEX, GATES[:3]), r"expected gates of shape \(9, 2\), found torch.float32 \(3, 2\)"),
        ((HIDDEN, INDEX, INDEX), r"expected gates of shape \(9, 2\), found torch.int64 \(9, 2\)"),
        ((HIDDEN[:4], INDEX, GATES), r"layer 3: expected 9 tokens, as many as ids, found torch.float32 \(4, 8\)"),
    ],
)
def test_another_call_is_refused_by_name(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        read_call("layer 3", args, {})


def test_who_needs_only_ids_needs_no_gates() -> None:
    assert read_index("experts", (HIDDEN, INDEX), {}) is INDEX


@pytest.mark.parametrize("shape", [(9, 8), (3, 3, 8)])
def test_the_gated_slots_add_up_to_what_the_module_returns(shape: tuple[int, ...]) -> None:
    experts = experts_of("batched_mm", NUM_SLOTS)
    call = read_call("experts", (HIDDEN.reshape(shape), INDEX, GATES), {})
    every = torch.arange(INDEX.numel())
    with torch.no_grad():
        found = call.summed(call.slot_by_slot(experts.forward), every)
        torch.testing.assert_close(found, experts(HIDDEN, INDEX, GATES).reshape(shape))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [INDEX, torch.full_like(INDEX, 1)], ids=["some live", "none live"])
def test_experts_with_zero_slots_compute_bit_for_bit_the_live_slots(
    implementation: str, dtype: torch.dtype, index: Tensor
) -> None:
    skipping = experts_of(implementation, len(KEPT), dtype)
    native = skipping.forward
    number = torch.full((NUM_SLOTS,), -1)
    number[list(KEPT)] = torch.arange(len(KEPT))
    call = read_call("experts", (HIDDEN.to(dtype), number[index], GATES), {})
    live = (call.index.reshape(-1) >= 0).nonzero().squeeze(1)
    with torch.no_grad():
        expected = call.summed(call.slot_by_slot(native, live), live)
        skipping.__class__ = skipping_class(MixtralExperts)
        skipping.kept_slots, skipping.num_slots = KEPT, NUM_SLOTS
        found = skipping(HIDDEN.to(dtype), index, GATES)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype == dtype
    assert bool(expected.any()) == bool(len(live))
