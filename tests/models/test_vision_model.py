"""V-MoE as a transformers model: what it computes, how it trains, and how it is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.modeling_secateur import probe_counts
from secateur.models.vmoe import VMoEConfig, VMoEForImageClassification, VMoEModel, sparse_mlp
from secateur.models.vmoe.flops import flops_per_image
from secateur.models.vmoe.losses import importance_loss, load_loss
from secateur.observation.activations import LayerObserver
from secateur.observation.loads import LoadCounter
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from support.fresh import in_fresh
from support.tiny_vision import COMMON, KINDS, every_kind, random_images, tiny_vmoe


def logits_of(model: VMoEForImageClassification, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).logits


@every_kind
def test_a_saved_model_loads_again_with_every_tensor_and_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = tiny_vmoe(kind)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is VMoEForImageClassification
    assert not any(info.values()), info
    fields = {name: getattr(model.config, name) for name in COMMON | KINDS[kind]}
    assert {name: getattr(again.config, name) for name in fields} == fields
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(logits_of(again, random_images(4)), logits_of(model, random_images(4)))


def test_the_auto_classes_know_it() -> None:
    config = AutoConfig.for_model("vmoe", **COMMON)
    assert type(config) is VMoEConfig
    assert type(AutoModel.from_config(config)) is VMoEModel
    assert type(AutoModelForImageClassification.from_config(config)) is VMoEForImageClassification


@pytest.mark.process
@pytest.mark.slow
def test_a_process_that_imports_nothing_but_secateur_loads_it_whole_and_pruned(tmp_path: Path) -> None:
    model = tiny_vmoe("token choice")
    model.save_pretrained(tmp_path / "whole")
    prune_model_(describe_moe(model), plan_of([0, 2, 5], layers=(2,)))
    model.save_pretrained(tmp_path / "pruned")
    code = (
        "import sys, secateur\nfrom transformers import AutoModelForImageClassification\n"
        "print(*(type(AutoModelForImageClassification.from_pretrained(folder)).__name__ for folder in sys.argv[1:]))"
    )
    said = in_fresh(code, tmp_path / "pruned", tmp_path / "whole")
    assert said.split() == ["PrunedVMoEForImageClassification", "VMoEForImageClassification"]


def test_an_image_alone_is_classified_as_among_others_where_it_is_a_group_of_its_own() -> None:
    images = random_images(5)
    alone = {}
    for group in (1, None):
        model = tiny_vmoe("few places", group_images=group)
        alone[group] = torch.cat([logits_of(model, image[None]) for image in images])
        same = torch.allclose(alone[group], logits_of(model, images), atol=1e-5)
        assert same is (group == 1)


def test_the_last_group_may_be_smaller() -> None:
    model = tiny_vmoe("few places")  # groups of two images
    images = random_images(3)
    together = logits_of(model, images)
    apart = torch.cat((logits_of(model, images[:2]), logits_of(model, images[2:])))
    torch.testing.assert_close(together, apart)
    alone = logits_of(tiny_vmoe("few places", group_images=1), images[2:])
    torch.testing.assert_close(together[2:], alone)


@pytest.mark.parametrize("kind", ["token choice", "few places", "expert choice"])
def test_the_experts_functions_of_transformers_agree(kind: str) -> None:
    model, images = tiny_vmoe(kind), random_images(4)
    expected = logits_of(model, images)
    assert model.config._experts_implementation == "grouped_mm"
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=1e-5)


def member_of(ensemble: VMoEForImageClassification, member: int) -> VMoEForImageClassification:
    """The model that one member of an ensemble is: the shared parameters, and its block of the experts."""
    config = copy.deepcopy(ensemble.config)
    size = config.num_experts // config.ensemble_size
    config.num_experts, config.ensemble_size = size, 1
    block = slice(member * size, (member + 1) * size)
    single = VMoEForImageClassification(config).eval()
    own = {
        name: value[block] if ".experts." in name or ".router." in name else value
        for name, value in ensemble.state_dict().items()
    }
    single.load_state_dict(own)
    return single


@pytest.mark.parametrize("places", [None, 0.5])
def test_an_ensemble_is_its_members_and_answers_with_the_mean_of_their_probabilities(places: float | None) -> None:
    ensemble, images = tiny_vmoe("ensemble", eval_capacity_factor=places), random_images(4)
    with torch.no_grad():
        found = ensemble(images, labels=torch.arange(4))
    members = torch.stack([logits_of(member_of(ensemble, member), images) for member in range(2)], dim=1)
    assert not torch.allclose(members[:, 0], members[:, 1], atol=1e-3)
    torch.testing.assert_close(found.member_logits, members, atol=1e-5, rtol=1e-5)
    mean = members.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(found.logits.exp(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, -mean[torch.arange(4), torch.arange(4)].log().mean(), atol=1e-5, rtol=1e-5)


def test_members_share_the_experts_of_a_probe_evenly() -> None:
    assert probe_counts(tiny_vmoe("ensemble").config) == (4, 6)
    assert probe_counts(tiny_vmoe("token choice").config) == (2, 3)


def plan_of(order: list[int], layers: tuple[int, ...] = (0, 2)) -> Plan:
    one = LayerPlan(experts_before=8, order=tuple(order))
    return Plan(layers=dict.fromkeys(layers, one), criterion="test")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    model = tiny_vmoe(kind, capacity_factor=4.0).train()
    found = model(random_images(8), labels=torch.arange(8) % 5)
    found.loss.backward()
    untouched = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert untouched == []
    assert all(one.grad.isfinite().all() for one in model.parameters())


def test_balance_losses_are_added_in_training_and_noise_is_only_there() -> None:
    model, images, labels = tiny_vmoe("token choice"), random_images(4), torch.arange(4)
    assert torch.equal(logits_of(model, images), logits_of(model, images))
    assert model(images, labels=labels).aux_loss is None
    model.train()
    torch.manual_seed(0)
    found = model(images, labels=labels)
    assert found.aux_loss > 0
    plain = torch.nn.functional.cross_entropy(found.logits, labels)
    torch.testing.assert_close(found.loss, plain + found.aux_loss)
    assert not torch.equal(model(images).logits, found.logits)
    model.config.router_noise_std = 0.0
    assert torch.equal(model(images).logits, model(images).logits)


def test_the_balance_loss_is_the_weighted_sum_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"importance_loss_coef": 0.25, "load_loss_coef": 0.5, "router_noise_std": 2.0, "group_images": None}
    model = tiny_vmoe("token choice", **fields).train()
    seen: list[Tensor] = []
    for block in describe_moe(model).blocks.values():
        block.router.register_forward_hook(lambda module, args, output: seen.append(output))
    monkeypatch.setattr(torch, "randn_like", torch.sin)
    found = model(random_images(2)).aux_loss
    pool = torch.zeros(2 * 17, dtype=torch.int64)
    assert len(seen) == 2
    expected = sum(
        0.25 * importance_loss(logits.softmax(dim=-1), pool, 1)
        + 0.5 * load_loss(logits, logits + 2 / 8 * logits.sin(), 2, 2 / 8, pool, 1, 8)
        for logits in seen
    )
    torch.testing.assert_close(found, expected)


def test_the_noise_of_an_ensemble_is_one_over_the_experts_of_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vmoe("ensemble", router_noise_std=2.0).train()  # two members of four experts
    plain: list[Tensor] = []
    noisy: list[Tensor] = []
    for block in describe_moe(model).blocks.values():
        block.router.register_forward_hook(lambda module, args, output: plain.append(output))
    route = sparse_mlp.route
    monkeypatch.setattr(
        sparse_mlp, "route", lambda logits, *rest, **more: noisy.append(logits) or route(logits, *rest, **more)
    )
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    model(random_images(2))
    assert len(plain) == len(noisy) == 2
    for slots, found in zip(plain, noisy, strict=True):
        rows = slots.view(
            4, 17, 2, 4
        )  # rows of the batch, members of an image after one another; tokens; members; experts
        own = torch.cat([rows[row, :, row % 2] for row in range(4)])
        torch.testing.assert_close(found, own + 2.0 / 4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_vmoe("few places").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(random_images(4), labels=torch.arange(4)).loss.backward()
        grads.append({name: one.grad for name, one in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_what_its_experts_do_can_be_observed() -> None:
    model, images = tiny_vmoe("token choice"), random_images(2)
    observer = LayerObserver(describe_moe(model).blocks[0])
    observer.start()
    expected = logits_of(model, images)
    stats = observer.read()
    observer.detach()
    assert torch.equal(logits_of(model, images), expected)
    assert int(stats.token_count.sum()) == 2 * 17 * 2  # images, tokens of each, experts of a token


def test_a_counter_of_text_tokens_says_that_it_cannot_count_those_of_images() -> None:
    model = tiny_vmoe("token choice").train()
    counter = LoadCounter(describe_moe(model))
    with pytest.raises(SecateurError, match=r"found \['pixel_values'\]; the experts of a model of images"):
        model(random_images(1))
    counter.detach()


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"\(1, 3, 8, 9\), expected \(images, channels, 8, 8\)"):
        tiny_vmoe("token choice")(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_type": "hash"}, "router_type is 'hash', expected one of"),
        ({"batch_priority": "min"}, "batch_priority is 'min'"),
        ({"num_experts": 0}, "num_experts is 0, expected a whole number above 0"),
        ({"group_images": 0}, "group_images is 0"),
        ({"moe_layers": []}, r"moe_layers is \[\], expected some of the blocks 0 to 2"),
        ({"moe_layers": [2, 1]}, r"moe_layers is \[2, 1\]"),
        ({"moe_layers": [3]}, r"moe_layers is \[3\]"),
        ({"patch_size": 16}, "images of 8 pixels hold no patch of 16"),
        ({"capacity_factor": 0.0}, r"capacity_factor is 0.0, expected a number above 0"),
        ({"router_type": "expert_choice", "eval_capacity_factor": None}, "experts that choose tokens need a number"),
        ({"ensemble_size": 3}, "8 experts, expected a multiple of ensemble_size 3"),
        ({"ensemble_size": 4, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, but a token has 2"),
    ],
)
def test_configs_that_no_model_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        VMoEConfig(**COMMON | changes)


def test_an_ensemble_computes_from_its_first_experts_on_once_for_each_member() -> None:
    config = VMoEConfig(**COMMON | KINDS["ensemble"] | {"moe_layers": [2]})  # 16 patches and a class token, two members
    found = flops_per_image(config, router_rows={2: 8}, pairs={2: 10})
    tokens = 17 + 17 + 2 * 17  # of the three blocks
    assert found == {
        "embedding": 2 * 16 * (4 * 3) * 32,
        "attention": 8 * tokens * 32**2 + 4 * tokens * 17 * 32,
        "mlp": 4 * (17 + 17) * 32 * 24,
        "router": 2 * 34 * 32 * 8,
        "experts": 4 * 10 * 32 * 24,
        "head": 2 * 2 * (32 * 16 + 16 * 5),
    }
