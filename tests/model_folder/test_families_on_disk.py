"""Every family goes through the whole chain on the disk; a new row of FAMILIES goes through it as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.families import describe_moe, logits_of
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.undo import restore
from secateur.surgery.oracle import barred_experts
from support.model_folders import contents, loaded, run_card, saved
from support.tiny_models import FAMILIES, KINDS, ONE_OF_EACH_LAYOUT, families, random_plan, random_tokens

# One of each kind: an expert's own tensors, router groups, all experts on axis 0 with biases, a bias on axis 1.
QUICK = {"mixtral", "deepseek_v3 grouped", "gpt_oss", "ernie4_5_moe"}


@pytest.mark.parametrize("name", families(FAMILIES.keys(), KINDS))
def test_the_experts_of_a_folder_are_those_of_the_live_model(name: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(name, tmp_path / "source"))
    folder = read_model_folder(tmp_path / "source")
    assert folder.counts == moe.counts
    assert (folder.config.top_k, folder.config.num_groups, folder.config.min_experts) == (
        moe.top_k,
        moe.num_groups,
        moe.min_experts,
    )
    size = {"expert": 0, "router": 0}
    for tensor, place in folder.located.items():
        size[place.role] += folder.files.tensors[tensor].length
    live = {"expert": 0, "router": 0}
    for block in moe.blocks.values():
        for spec in block.tensors:
            role = "expert" if spec.name.startswith(f"{block.name}.experts.") else "router"
            tensor_of = block.block.get_submodule(spec.name.removeprefix(f"{block.name}.").rpartition(".")[0])
            live[role] += getattr(tensor_of, spec.name.rpartition(".")[2]).nbytes
    assert size == live


@pytest.mark.parametrize("name", families(KINDS, QUICK))
def test_a_pruned_folder_computes_what_the_barred_source_computes(name: str, tmp_path: Path) -> None:
    check_folder(name, uniform=False, tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QUICK))
def test_so_does_one_with_one_count(name: str, tmp_path: Path) -> None:
    check_folder(name, uniform=True, tmp_path=tmp_path)


def check_folder(name: str, *, uniform: bool, tmp_path: Path) -> None:
    moe = describe_moe(saved(name, tmp_path / "source"))
    tokens = random_tokens(2, 12)
    plan = random_plan(moe, tokens, uniform=uniform)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out", undo=tmp_path / "undo")
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    assert not torch.equal(expected, logits_of(moe.model, tokens)), "the plan changes nothing: this could not fail"
    pruned = loaded(tmp_path / "out")
    assert torch.equal(logits_of(pruned, tokens), expected)
    if name in QUICK:  # the lines of a card are the same for every family
        assert type(run_card(tmp_path / "out")) is type(pruned)
    counts = {layer: one.experts_after for layer, one in plan.layers.items()}
    assert describe_moe(pruned).counts == counts
    assert type(pruned).__name__.startswith("Pruned") == (len(set(counts.values())) > 1)

    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


@pytest.mark.parametrize("name", families(ONE_OF_EACH_LAYOUT, rows=sorted(KINDS)))
def test_verify_passes_in_any_order_of_the_experts(name: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(name, tmp_path / "source"))
    apply_to_model(tmp_path / "source", random_plan(moe, seed=3, ascending=False), tmp_path / "out")
    checks = verify_model(tmp_path / "source", tmp_path / "out", num_tokens=8)
    assert {check.passed for check in checks} == {True}, checks


@pytest.mark.parametrize("name", families(ONE_OF_EACH_LAYOUT, QUICK, sorted(KINDS)))
def test_a_folder_with_the_names_of_the_live_model_is_understood_as_well(name: str, tmp_path: Path) -> None:
    moe = describe_moe(saved(name, tmp_path / "source", save_original_format=False))
    tokens = random_tokens(2, 12)
    plan = random_plan(moe, tokens, uniform=True)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    with barred_experts(moe, plan):
        expected = logits_of(moe.model, tokens)
    assert torch.equal(logits_of(loaded(tmp_path / "out"), tokens), expected)


def test_every_family_that_the_issue_names_has_a_row() -> None:
    named = (
        "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text olmoe flex_olmo deepseek_v2 deepseek_v3 glm4_moe "
        "dots1 gpt_oss phimoe minimax minimax_m2 granitemoe ernie4_5_moe jamba nemotron_h lfm2_moe hunyuan_v1_moe dbrx"
    )
    assert set(named.split()) <= {family.model_type for family in FAMILIES.values()}
