"""Every kind of V-MoE goes through the whole chain on the disk: inspect, apply, verify, undo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.read.inspect import inspect
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.undo import restore
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.surgery.oracle import barred_experts
from support.claims import detail, fallen, not_checked
from support.long_tests import long
from support.model_folders import contents
from support.tiny_models import random_plan
from support.tiny_vision import KINDS, every_kind, loaded, random_images, saved

# One of each router, places and members; the other kinds are left to the long tests.
QUICK = {"few places", "expert choice", "ensemble"}
quick_kinds = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=long) for kind in KINDS]
)


@every_kind
def test_the_experts_of_a_folder_are_those_of_the_live_model(kind: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(kind, tmp_path / "source"))
    folder = read_model_folder(tmp_path / "source")
    assert folder.counts == moe.counts == {0: 8, 2: 8}
    assert (folder.config.top_k, folder.config.num_groups, folder.config.min_experts) == (
        moe.top_k,
        moe.num_groups,
        moe.min_experts,
    )
    assert (moe.num_groups, moe.min_experts) == ((2, 4) if kind == "ensemble" else (1, 2))
    located = {place.role: 0 for place in folder.located.values()}
    for name, place in folder.located.items():
        located[place.role] += folder.files.tensors[name].length
    block = moe.blocks[0].block
    assert located["expert"] == 2 * sum(one.nbytes for one in block.experts.parameters())
    assert located["router"] == 2 * block.router.weight.nbytes
    described = inspect(tmp_path / "source").to_json()
    assert (described["model_type"], described["class"]) == ("vmoe", "VMoEForImageClassification")


@quick_kinds
@pytest.mark.parametrize("uniform", [True, False], ids=["one count", "different counts"])
def test_a_pruned_folder_computes_what_the_barred_source_computes(kind: str, uniform: bool, tmp_path: Path) -> None:
    moe = describe_moe(saved(kind, tmp_path / "source"))
    images = random_images(3)
    plan = random_plan(moe, images, uniform=uniform)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out", undo=tmp_path / "undo")
    source = loaded(tmp_path / "source")
    with barred_experts(describe_moe(source), plan):
        expected = logits_of(source, images)
    assert not torch.equal(expected, logits_of(source, images)), "the plan changes nothing, so this test could not fail"
    pruned = loaded(tmp_path / "out")
    assert torch.equal(logits_of(pruned, images), expected)
    assert describe_moe(pruned).counts == {layer: one.experts_after for layer, one in plan.layers.items()}
    assert type(pruned).__name__.startswith("Pruned") is not uniform

    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


@pytest.mark.slow
@quick_kinds
def test_verify_passes_in_any_order_of_the_experts(kind: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(kind, tmp_path / "source"))
    apply_to_model(tmp_path / "source", random_plan(moe, seed=3, ascending=False), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=40)
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"}), checks
    assert detail(checks, "logits").startswith("3 images")  # of 16 patches


def test_verify_finds_a_tensor_that_was_changed(tmp_path: Path) -> None:
    moe = describe_moe(saved("token choice", tmp_path / "source"))
    apply_to_model(tmp_path / "source", random_plan(moe), tmp_path / "out")
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        model.vmoe.layers[2].mlp.router.weight[0] *= -1
    changed = model.state_dict()["vmoe.layers.2.mlp.router.weight"]
    file = next(one for one in (tmp_path / "out").glob("*.safetensors") if changed_in(one, "layers.2.mlp.router"))
    rewrite(file, "vmoe.layers.2.mlp.router.weight", changed)
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=16)
    assert fallen(checks) == {"tensors", "logits"}


def changed_in(file: Path, part: str) -> bool:
    return part in file.read_bytes()[:4096].decode("latin-1")


def rewrite(file: Path, name: str, value: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {name: value.contiguous()}, file, metadata={"format": "pt"})


def test_a_text_is_no_sample_for_images(tmp_path: Path) -> None:
    moe = describe_moe(saved("token choice", tmp_path / "source"))
    apply_to_model(tmp_path / "source", random_plan(moe), tmp_path / "out")
    with pytest.raises(SecateurError, match="a 'vmoe' model reads images"):
        verify_model(tmp_path / "source", tmp_path / "out", text=tmp_path / "some.txt")


def test_members_of_an_ensemble_keep_the_same_number_of_their_own_experts(tmp_path: Path) -> None:
    saved("ensemble", tmp_path / "source")
    for order in ((0, 1, 2, 4), (4, 5, 0, 1)):
        plan = Plan(layers={0: LayerPlan(experts_before=8, order=order)}, criterion="test")
        with pytest.raises(SecateurError, match="each must keep the same number of its own experts"):
            apply_to_model(tmp_path / "source", plan, tmp_path / "out")


@pytest.mark.parametrize("uniform", [True, False], ids=["one count", "different counts"])
def test_a_live_model_is_pruned_as_its_folder_is(uniform: bool, tmp_path: Path) -> None:
    model, images = saved("ensemble", tmp_path / "source"), random_images(3)
    moe = describe_moe(model)
    plan = random_plan(moe, uniform=uniform)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    prune_model_(moe, plan)
    assert torch.equal(logits_of(model, images), logits_of(loaded(tmp_path / "out"), images))
    model.save_pretrained(tmp_path / "live")
    assert torch.equal(logits_of(loaded(tmp_path / "live"), images), logits_of(model, images))
