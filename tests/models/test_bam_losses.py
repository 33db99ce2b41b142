"""The losses of BAM's routers: their values, where their gradients go, and when they are part of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.models.bam.losses import load_balance_loss, router_losses, z_loss
from support.tiny_bam import every_kind, random_hidden, random_ids, tiny_bam

NEAR = {"rtol": 1e-12, "atol": 1e-12}


def close(found: Tensor, expected: float, **tolerance: float) -> bool:
    return math.isclose(found.item(), expected, rel_tol=tolerance.get("rtol", 1e-12), abs_tol=1e-12)


def test_even_routing_costs_1_and_full_collapse_costs_as_much_as_there_are_experts() -> None:
    even = torch.eye(4, dtype=torch.float64) * 1e-13  # each token prefers another expert, by next to nothing
    assert close(load_balance_loss(even, 1), 1.0)
    collapsed = torch.tensor([[1000.0, 0, 0, 0]] * 5, dtype=torch.float64)
    assert close(load_balance_loss(collapsed, 1), 4.0)


def test_a_hand_computed_value_of_two_experts_a_token() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]], dtype=torch.float64).log()
    # choices: {0, 1}, {1, 2}: f = 1/4, 1/2, 1/4; P = 0.3, 0.5, 0.2
    assert close(load_balance_loss(logits, 2), 3 * (0.25 * 0.3 + 0.5 * 0.5 + 0.25 * 0.2))
    # one choice: 0 and 1: f = 1/2, 1/2, 0
    assert close(load_balance_loss(logits, 1), 3 * (0.5 * 0.3 + 0.5 * 0.5))
    assert close(z_loss(logits + 2.0), 4.0)  # the probabilities add up to 1, so logsumexp is 2


@pytest.mark.parametrize("number", [2, 4, 7])
def test_the_z_loss_at_zero_logits_is_the_square_of_the_logarithm_of_the_experts(number: int) -> None:
    assert close(z_loss(torch.zeros(3, number, dtype=torch.float64)), math.log(number) ** 2)


def test_padding_has_no_part() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([1, 0, 1, 1, 0, 0])
    for found, expected in zip(
        router_losses([(logits, 2)], keep), router_losses([(logits[keep == 1], 2)]), strict=True
    ):
        torch.testing.assert_close(found, expected, **NEAR)
    assert not any(one.item() for one in router_losses([(logits, 1)], torch.zeros(6)))


def test_the_gradient_flows_through_the_probabilities_alone() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    load_balance_loss(logits, 1).backward()
    probabilities = logits.detach().softmax(-1)
    share = torch.nn.functional.one_hot(logits.argmax(-1), 3).double().mean(0)
    # d/dz of 3 * sum_i f_i mean_t p_ti, with f constant
    expected = 3 / 6 * probabilities * (share - (probabilities @ share)[:, None])
    torch.testing.assert_close(logits.grad, expected, **NEAR)


@every_kind
def test_given_fixed_inputs_only_routers_get_a_gradient(kind: str) -> None:
    layer, hidden = tiny_bam(kind).model.layers[0], random_hidden(2, 7)
    logits = layer.mlp.gate(hidden)[0]
    parameters = dict(layer.named_parameters())
    for loss in (load_balance_loss(logits, 1), z_loss(logits)):
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {name for name, grad in zip(parameters, grads, strict=True) if grad is not None and grad.any()}
        assert reached == {"mlp.gate.weight"}


@every_kind
def test_in_training_the_loss_is_that_of_the_labels_and_the_weighted_sums_over_layers(kind: str) -> None:
    model, ids = tiny_bam(kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2), random_ids(2, 7)
    quiet = model(ids, labels=ids)
    loud = model.train()(ids, labels=ids)
    balance, size = [], []
    choices = [(logits, model.config.num_experts_per_tok) for logits in loud.router_logits]
    if kind == "sparse":  # its attention routers choose too
        choices += [(logits, 2) for logits in loud.attention_router_logits]
    for logits, top_k in choices:
        balance.append(load_balance_loss(logits, top_k))
        size.append(z_loss(logits))
    torch.testing.assert_close(loud.load_balance_loss, torch.stack(balance).sum(), **NEAR)
    torch.testing.assert_close(loud.router_z_loss, torch.stack(size).sum(), **NEAR)
    torch.testing.assert_close(loud.aux_loss, 0.3 * loud.load_balance_loss + 0.2 * loud.router_z_loss, **NEAR)
    torch.testing.assert_close(loud.loss, quiet.loss + loud.aux_loss, **NEAR)
    torch.testing.assert_close(quiet.aux_loss, loud.aux_loss, **NEAR)
    cross_entropy = torch.nn.functional.cross_entropy(quiet.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(quiet.loss, cross_entropy.item(), rtol=1e-6)  # transformers computes it in float32


def test_the_config_or_the_call_turns_the_routers_losses_off() -> None:
    ids = random_ids(2, 7)
    by_config = tiny_bam("own keys", output_router_logits=False).train()(ids, labels=ids)
    by_call = tiny_bam("own keys").train()(ids, labels=ids, output_router_logits=False)
    assert by_config.aux_loss is by_call.aux_loss is None
    assert by_config.router_logits is None
    assert torch.equal(by_config.loss, by_call.loss)
    assert tiny_bam("own keys")(ids).router_logits is None
    assert len(tiny_bam("own keys")(ids, output_router_logits=True).router_logits) == 2


def test_batches_of_one_step_add_the_losses_by_their_share_of_the_targets() -> None:
    model, ids = tiny_bam("own keys", router_aux_loss_coef=0.3).train(), random_ids(2, 7)
    alone = model(ids, labels=ids)
    step: dict[str, Any] = {"num_items_in_batch": torch.tensor(48)}  # of which these are 12
    part = model(ids, labels=ids, **step)
    torch.testing.assert_close(part.loss, alone.loss / 4, rtol=1e-6, atol=1e-7)


def test_padding_of_a_batch_is_left_out_by_its_mask() -> None:
    model, ids = tiny_bam("own keys").train(), random_ids(1, 7)
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.int64)), dim=1)
    mask = (padded > 0).long()
    alone, found = model(ids, labels=ids), model(padded, attention_mask=mask, labels=padded.where(mask == 1, -100))
    torch.testing.assert_close(found.aux_loss, alone.aux_loss, **NEAR)
    torch.testing.assert_close(found.loss, alone.loss, rtol=1e-6, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient_and_the_form_that_loses_the_routers_is_refused() -> None:
    grads, ids = [], random_ids(2, 7)
    for checkpointing in (False, True):
        model = tiny_bam("shared keys").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, **NEAR)
        assert grad.any(), name
    model = tiny_bam("own keys").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SecateurError, match="use_reentrant"):
        model(ids, labels=ids)
