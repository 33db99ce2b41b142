"""Muon, as pre-training uses it: its matrices beside an AdamW for everything else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.train.laep import LAEP
from support.tiny_models import random_tokens, tiny_model


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's Muon takes matrices alone: attention and routers; experts are stacks of them."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=1e-3)]


def go(model: Any, optimizers: list[torch.optim.Optimizer], pruner: LAEP | None, steps: range) -> None:
    for index in steps:
        tokens = random_tokens(2, 8, seed=index)
        model(input_ids=tokens, labels=tokens).loss.backward()
        for one in optimizers:
            one.step()
        if pruner is not None:
            pruner.step()
        for one in optimizers:
            one.zero_grad()


def test_muon_goes_on_as_for_a_model_built_with_the_pruned_counts_and_given_its_momentum() -> None:
    model = tiny_model("mixtral").train()
    optimizers = muon_and_adamw(model)
    pruner = LAEP(model, optimizers, at_step=3, alpha=0.9, window_steps=2)
    go(model, optimizers, pruner, range(3))
    (event,) = pruner.events
    assert event.oracle_max_abs_difference == 0.0
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).train()
    reference.load_state_dict(model.state_dict())
    others = muon_and_adamw(reference)
    for one, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    go(model, optimizers, None, range(3, 6))
    go(reference, others, None, range(3, 6))
    expected = reference.state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])] == []


def test_the_momentum_of_a_router_is_that_of_its_kept_experts_and_its_update_is_of_all_rows_together() -> None:
    pruned, whole = tiny_model("mixtral").train(), tiny_model("mixtral").train()
    first, second = muon_and_adamw(pruned), muon_and_adamw(whole)
    pruner = LAEP(pruned, first, at_step=3, alpha=0.9, window_steps=2)
    go(pruned, first, pruner, range(3))
    go(whole, second, None, range(3))
    for layer, layer_plan in pruner.events[0].plan.layers.items():
        name, order = f"model.layers.{layer}.mlp.gate.weight", list(layer_plan.order)
        mine, theirs = pruned.get_parameter(name), whole.get_parameter(name)
        momenta = first[0].state[mine]["momentum_buffer"], second[0].state[theirs]["momentum_buffer"]
        assert torch.equal(momenta[0], momenta[1][order])
        for parameter, optimizer in ((mine, first[0]), (theirs, second[0])):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
        if len(order) < 8:  # so "gather, then step" is not "step, then gather"
            assert not torch.allclose(mine, theirs[order], atol=1e-5)
