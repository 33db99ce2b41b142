"""What a training script keeps beside the model stays right through a pruning: lists, hooks, copies, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.surgery.optimizer import each_of, unwrap
from secateur.surgery.oracle import barred_experts
from secateur.train.laep import LAEP
from support.tiny_models import random_tokens, tiny_model

AT = 2


def is_router(name: str) -> bool:
    return ".gate." in name


def train(
    model: PreTrainedModel,
    optimizers: Iterable[torch.optim.Optimizer],
    pruner: LAEP | None,
    *,
    steps: int = 4,
    after: Callable[[], Any] = lambda: None,
) -> list[float]:
    losses = []
    for index in range(steps):
        tokens = random_tokens(2, 8, seed=index)
        loss = model(input_ids=tokens, labels=tokens).loss  # the graph of the step before is still alive here
        loss.backward()
        after()
        for one in optimizers:
            one.step()
        if pruner is not None:
            pruner.step()
        for one in optimizers:
            one.zero_grad()
        losses.append(loss.item())
    return losses


def split_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    return [
        torch.optim.AdamW([p for name, p in named if is_router(name) == routers], lr=1e-2) for routers in (False, True)
    ]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def laep(model: nn.Module, optimizer: Any, **settings: Any) -> LAEP:
    return LAEP(model, optimizer, **{"at_step": AT, "alpha": 0.9, "window_steps": 2, **settings})


def test_a_list_of_parameters_clips_the_gradients_that_there_are_after_a_pruning() -> None:
    model = tiny_model("mixtral").train()
    optimizer, parameters = adamw(model), list(model.parameters())
    pruner = laep(model, optimizer)
    norms: list[tuple[Tensor, Tensor]] = []

    def clip() -> None:
        whole = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norms.append((nn.utils.clip_grad_norm_(parameters, 1e9), whole))

    train(model, [optimizer], pruner, after=clip)
    assert len(pruner.events) == 1
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(old is new for old, new in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert set(optimizer.state) == set(parameters)
    assert all(torch.equal(found, expected) and expected > 0 for found, expected in norms)


def test_hooks_that_were_set_after_laep_was_made_see_the_gradients_of_the_experts_that_are_left() -> None:
    model = tiny_model("mixtral").train()
    optimizer = adamw(model)
    pruner = laep(model, optimizer)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    shapes: list[int] = []
    weight.register_hook(lambda grad: shapes.append(len(grad)))
    weight.register_post_accumulate_grad_hook(lambda parameter: shapes.append(len(parameter)))
    train(model, [optimizer], pruner)
    left = pruner.moe.counts[0]
    assert left < 8
    assert shapes == [8] * 2 * AT + [left] * 4


def test_copies_follow_a_pruning_and_go_on_as_averages() -> None:
    model = tiny_model("mixtral").train()
    average, reference = AveragedModel(model), copy.deepcopy(model)
    before = copy.deepcopy(reference)
    optimizer = adamw(model)
    pruner = laep(model, optimizer, copies=[average, reference])
    train(model, [optimizer], pruner, after=lambda: average.update_parameters(model))
    (event,) = pruner.events
    shapes = [parameter.shape for parameter in model.parameters()]
    assert [parameter.shape for parameter in average.module.parameters()] == shapes
    with barred_experts(describe_moe(before), event.plan):
        expected = logits_of(before, random_tokens(2, 8))
    assert torch.equal(logits_of(reference, random_tokens(2, 8)), expected)


@pytest.mark.parametrize("kept_as", ["dict", "list", "list of the trained"])
def test_tensors_that_a_script_keeps_follow_a_pruning_as_a_model_does(kept_as: str) -> None:
    model = tiny_model("mixtral").train()
    model.lm_head.requires_grad_(False)
    average = copy.deepcopy(model)
    wanted = [name for name, one in model.named_parameters() if one.requires_grad or kept_as != "list of the trained"]
    kept = {name: dict(model.named_parameters())[name].detach().clone() for name in wanted}
    tensors = list(kept.values())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    pruner = laep(model, optimizer, copies=[kept if kept_as == "dict" else tensors, average])

    @torch.no_grad()
    def update() -> None:
        now, averages = dict(model.named_parameters()), dict(average.named_parameters())
        for name, tensor in kept.items():
            for mine in (tensor, averages[name]):
                mine.lerp_(now[name], 0.1)

    train(model, [optimizer], pruner, after=update)
    assert len(pruner.events) == 1
    assert all(torch.equal(tensor, dict(average.named_parameters())[name]) for name, tensor in kept.items())
    assert all(one is other for one, other in zip(tensors, kept.values(), strict=True))


def test_tensors_that_are_not_those_of_the_model_are_refused_before_training() -> None:
    model = tiny_model("mixtral")
    held = list(model.parameters())
    for wrong, message in (
        (held[:-1], rf"a list of {len(held) - 1} tensors, expected one for each of the {len(held)} parameters"),
        ({"module.weight": held[0]}, r"found tensors named module\.weight, \.\.\., expected names of parameters"),
        (
            {name: one[:4] for name, one in model.named_parameters()},
            r"mlp\..*: axis 0 of shape .* has 4 entries, expected 8",
        ),
    ):
        with pytest.raises(SecateurError, match=message):
            laep(model, adamw(model), copies=[wrong])


def test_a_copy_of_another_shape_is_refused_before_training() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(SecateurError, match="copies: found the model that is trained"):
        laep(model, adamw(model), copies=[model])
    other = copy.deepcopy(model)
    laep_of_other = laep(other, adamw(other))
    train(other.train(), laep_of_other._trained_by.optimizers, laep_of_other)
    with pytest.raises(SecateurError, match="copies: found a model with experts"):
        laep(model, adamw(model), copies=[other])


def test_experts_and_routers_in_two_optimizers_go_on_as_in_one() -> None:
    finals = []
    for make in (lambda model: [adamw(model)], split_optimizers):
        model = tiny_model("mixtral").train()
        optimizers = make(model)
        pruner = laep(model, optimizers)
        losses = train(model, optimizers, pruner)
        assert len(pruner.events) == 1
        finals.append((losses, model.state_dict(), pruner.events[0].memory_after))
    assert finals[0][0] == finals[1][0]
    assert finals[0][1].keys() == finals[1][1].keys()
    assert [key for key in finals[0][1] if not torch.equal(finals[0][1][key], finals[1][1][key])] == []
    assert finals[0][2] == finals[1][2]


def test_routers_that_no_given_optimizer_has_are_refused_at_the_start_and_frozen_ones_are_not() -> None:
    model = tiny_model("mixtral")
    experts, routers = split_optimizers(model)
    with pytest.raises(SecateurError, match=r"gate\.weight is trained, but not a parameter of AdamW"):
        laep(model, experts)
    for parameter in routers.param_groups[0]["params"]:
        parameter.requires_grad_(False)
    laep(model, experts).detach()


@pytest.mark.parametrize("what", ["of another model", "master weights"])
def test_an_optimizer_that_holds_none_of_the_parameters_is_refused_at_the_start(what: str) -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    held = tiny_model("mixtral") if what == "of another model" else copy.deepcopy(model).float()
    with pytest.raises(SecateurError, match="is trained, but not a parameter of AdamW"):
        laep(model, adamw(held))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_optimizer_that_never_steps_is_found_at_the_pruning_and_nothing_is_changed(momentum: float) -> None:
    model = tiny_model("mixtral").train()
    idle = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    pruner = laep(model, idle)
    with pytest.raises(SecateurError, match=r"SGD, which was given to LAEP for it, has not stepped since"):
        train(model, [adamw(model)], pruner)  # made anew after LAEP
    assert set(describe_moe(model).counts.values()) == {8}


def test_models_that_were_made_from_one_config_are_pruned_each_for_itself() -> None:
    first = tiny_model("mixtral").train()
    second = type(first)(first.config).train()
    config = first.config
    before = config.to_dict()
    optimizer = adamw(first)
    train(first, [optimizer], laep(first, optimizer))
    assert type(first).__name__ == "PrunedMixtralForCausalLM"
    assert second.config is config
    assert config.to_dict() == before
    assert set(describe_moe(second).counts.values()) == {8}
    owned = [module.config for module in first.modules() if hasattr(module, "config")]
    assert all(one is first.config for one in owned)


class LightningAdamW(torch.optim.AdamW):
    """As Lightning makes it: a class for each optimizer, that has its attributes and itself as `optimizer`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__.update(optimizer.__dict__)
        self.optimizer = optimizer


def test_the_wrapper_of_lightning_is_seen_through() -> None:
    LightningAdamW.__module__ = "lightning.pytorch.core.optimizer"
    inner = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    wrapped = LightningAdamW(inner)
    assert unwrap(wrapped) is inner
    assert each_of([wrapped, inner]) == (inner, inner)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"optimizer: found a builtins\.str, expected optimizers of torch"):
        each_of(["adamw"])  # type: ignore[list-item]
