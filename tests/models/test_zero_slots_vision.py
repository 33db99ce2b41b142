"""Zero slots of V-MoE, the models in which they were published: token choice, expert choice, and ensembles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.families import describe_moe, logits_of
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.undo import restore
from secateur.models.vmoe.losses import importance_loss, load_loss
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.zero_slots import remove_into_zero_slots_
from support.claims import detail, fallen, not_checked
from support.long_tests import long
from support.model_folders import contents
from support.tiny_vision import KINDS, every_kind, loaded, random_images, saved, tiny_vmoe
from support.zero_slot_models import check_close, silenced_logits, zero_slot_plan

IMAGES = random_images(4)
LAYERS = (0, 2)
# Of an ensemble the first member keeps one expert and the second three; in the other layer the first keeps none.
ORDERS = ((0, 5, 6, 7), (4, 5))
# One of each router and members; the live models of the other kinds are tried beside it.
MARKS: dict[str, Any] = {"ensemble": [], "expert choice": pytest.mark.slow, "over tokens": pytest.mark.slow}
quick_kinds = pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, long)) for kind in KINDS])


@every_kind
def test_removed_experts_contribute_nothing_and_the_other_weights_and_places_stay(kind: str) -> None:
    model = tiny_vmoe(kind)
    plan = zero_slot_plan(LAYERS, ORDERS)
    expected = silenced_logits(model, plan, IMAGES)
    assert not torch.allclose(expected, logits_of(model, IMAGES), atol=1e-3)
    remove_into_zero_slots_(model, plan)
    assert type(model).__name__ == "PrunedVMoEForImageClassification"
    assert model.config.num_experts == 8
    check_close(logits_of(model, IMAGES), expected)


@quick_kinds
def test_a_folder_goes_through_the_whole_chain(kind: str, tmp_path: Path) -> None:
    model, plan = saved(kind, tmp_path / "source"), zero_slot_plan(LAYERS, ORDERS)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out", undo=tmp_path / "undo")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=40)
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"}), checks
    assert detail(checks, "logits") == "3 images, bit for bit"
    remove_into_zero_slots_(model, plan)
    assert torch.equal(logits_of(loaded(tmp_path / "out"), IMAGES), logits_of(model, IMAGES))
    model.save_pretrained(tmp_path / "live")
    assert torch.equal(logits_of(loaded(tmp_path / "live"), IMAGES), logits_of(model, IMAGES))
    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


@pytest.mark.parametrize(("kind", "same"), [("over tokens", True), ("expert choice", False), ("token choice", False)])
def test_both_removals_are_the_same_model_only_where_weights_are_taken_over_tokens(kind: str, same: bool) -> None:
    zero_slots, cut = tiny_vmoe(kind), tiny_vmoe(kind)
    layers = dict.fromkeys(LAYERS, LayerPlan(experts_before=8, order=(3, 0, 7, 4, 5)))
    plan = Plan(layers=layers, criterion="test")
    remove_into_zero_slots_(zero_slots, plan)
    prune_model_(describe_moe(cut), plan)
    assert torch.allclose(logits_of(zero_slots, IMAGES), logits_of(cut, IMAGES), atol=1e-5) is same


def test_removing_twice_is_removing_at_once() -> None:
    once, twice = tiny_vmoe("ensemble"), tiny_vmoe("ensemble")
    remove_into_zero_slots_(once, zero_slot_plan(LAYERS, ((0, 2, 5, 7),)))
    remove_into_zero_slots_(twice, zero_slot_plan(LAYERS, ((0, 1, 2, 5, 6, 7),)))
    later = LayerPlan(experts_before=6, order=(0, 2, 3, 5))
    remove_into_zero_slots_(twice, Plan(layers=dict.fromkeys(LAYERS, later), criterion="test"))
    assert torch.equal(logits_of(twice, IMAGES), logits_of(once, IMAGES))


@every_kind
def test_every_parameter_that_is_left_learns(kind: str) -> None:
    model = tiny_vmoe(kind, capacity_factor=4.0)
    remove_into_zero_slots_(model, zero_slot_plan(LAYERS, ((6, 0, 5, 7),)))
    found = model.train()(random_images(8), labels=torch.arange(8) % 5)
    found.loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()] == []
    assert all(one.grad.isfinite().all() for one in model.parameters())


def losses_of_a_layer(logits: Tensor, member: Tensor, kept: tuple[int, ...], members: int) -> Tensor:
    """Mean over members of the two losses, each by the columns that are left, with the noise of `torch.sin`."""
    size, total = 8 // members, torch.zeros(())
    for number in range(members):
        mine = logits[member == number][:, number * size : (number + 1) * size]
        noisy = mine + 2 / size * mine.sin()
        columns = [slot % size for slot in kept if slot // size == number]
        if columns:
            pool = torch.zeros(len(mine), dtype=torch.int64)
            shares = mine.softmax(dim=-1)[:, columns]
            total = total + 0.25 * importance_loss(shares, pool, 1)
            threshold = noisy.topk(2, dim=-1).values[:, -1:]
            chosen = torch.special.ndtr((mine - threshold) / (2 / size))[:, columns].sum(dim=0)
            total = total + 0.5 * chosen.var(correction=0) / chosen.mean() ** 2
            if len(columns) == size:
                whole = load_loss(mine, noisy, 2, 2 / size, pool, 1, size)
                torch.testing.assert_close(whole, chosen.var(correction=0) / chosen.mean() ** 2)
    return total / members


@pytest.mark.parametrize("kind", ["token choice", "ensemble"])
def test_zero_slots_have_no_part_in_the_balance_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"importance_loss_coef": 0.25, "load_loss_coef": 0.5, "router_noise_std": 2.0, "group_images": None}
    model = tiny_vmoe(kind, **fields)
    members = model.config.ensemble_size
    remove_into_zero_slots_(model, zero_slot_plan(LAYERS, ORDERS))
    seen: list[Tensor] = []
    for layer in LAYERS:
        model.vmoe.layers[layer].mlp.router.register_forward_hook(lambda module, args, output: seen.append(output))
    monkeypatch.setattr(torch, "randn_like", torch.sin)
    found = model.train()(random_images(2)).aux_loss
    member = (torch.arange(2 * members) % members).repeat_interleave(17)
    expected = sum(losses_of_a_layer(logits, member, kept, members) for logits, kept in zip(seen, ORDERS, strict=True))
    torch.testing.assert_close(found, expected)


def test_one_expert_alone_is_balanced() -> None:
    model = tiny_vmoe("token choice")
    remove_into_zero_slots_(model, zero_slot_plan(LAYERS, ((3,),)))
    assert model.train()(random_images(2)).aux_loss == 0


def test_a_pool_that_prefers_removed_experts_has_no_loss_and_a_finite_gradient() -> None:
    """The first two of three slots have experts; all tokens of the second pool prefer the third by far."""
    pool = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[1.0, 0.9, 0.0], [0.9, 0.8, 0.0], [0.0, 0.1, 200.0], [0.1, 0.0, 200.0]], requires_grad=True)
    load = load_loss(logits, logits, 1, 0.1, pool, 2, 2)
    importance = importance_loss(logits.softmax(dim=-1)[:, :2], pool, 2)
    (load + importance).backward()
    only = [load_loss(logits[:2], logits[:2], 1, 0.1, pool[:2], 1, 2)]
    only.append(importance_loss(logits[:2].softmax(dim=-1)[:, :2], pool[:2], 1))
    assert load > 0.01
    torch.testing.assert_close(torch.stack([load, importance]), torch.stack(only) / 2)
    assert logits.grad is not None
    assert logits.grad[:2].any()
    assert not logits.grad[2:].any()
