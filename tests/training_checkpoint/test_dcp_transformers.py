"""A checkpoint pruned on disk is the one that a run pruned in memory would have written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import prune_model_
from secateur.training_checkpoint import write
from secateur.training_checkpoint.apply import apply_to_checkpoint
from secateur.training_checkpoint.metadata import read_dcp
from support.dcp_checkpoints import (
    PERMUTATION,
    PLAN,
    adamw,
    restore,
    save,
    save_shards,
    step,
    tensors_of,
    trained,
    training_state,
)

BOTH = pytest.mark.parametrize("plan", [PLAN, PERMUTATION], ids=["pruning", "placement"])


@BOTH
def test_model_and_optimizer_equal_those_pruned_in_memory_and_so_does_the_next_step(tmp_path: Path, plan: Plan) -> None:
    model, optimizer = trained()
    save(training_state(model, optimizer), tmp_path / "source")
    prune_model_(describe_moe(model), plan, optimizer)

    apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other_optimizer = adamw(other)
    restore(tmp_path / "out", other, other_optimizer)
    for _ in range(2):
        for (name, mine), (_, loaded) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(mine, loaded), name
            for key, value in optimizer.state[mine].items():
                assert torch.equal(value, other_optimizer.state[loaded][key]), (name, key)
        step(model, optimizer, seed=9)
        step(other, other_optimizer, seed=9)


@pytest.mark.slow
def test_pieces_of_a_few_bytes_give_the_same_checkpoint_as_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(training_state(*trained()), tmp_path / "source")
    apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "whole")
    monkeypatch.setattr(write, "FILE_BYTES", 5000)
    apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "pieces")
    # from many chunks to one
    monkeypatch.undo()
    identity = Plan(layers={1: LayerPlan(experts_before=8, order=tuple(range(8)))}, criterion="none")
    apply_to_checkpoint(tmp_path / "pieces", identity, tmp_path / "again")

    stored = read_dcp(tmp_path / "pieces")
    assert len(stored.tensors["model.layers.0.mlp.experts.gate_up_proj"].chunks) == 3
    assert len(list((tmp_path / "pieces").glob("*.distcp"))) > 50
    whole = tensors_of(tmp_path / "whole")
    for folder in ("pieces", "again"):
        found = tensors_of(tmp_path / folder)
        assert whole.keys() == found.keys()
        assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_a_distributed_save_with_its_optimizer_beside_it_loads_with_from_pretrained(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_shards(model, tmp_path / "source")
    save_optimizer_distributed(model, optimizer, str(tmp_path / "source/optimizer"))
    (tmp_path / "source/trainer_state.json").write_text('{"global_step": 2}')

    report = apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "out")

    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values())
    prune_model_(describe_moe(model), PLAN, optimizer)
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict().get("moe_config") == model.config.moe_config
    loaded_optimizer = adamw(loaded)
    load_optimizer_distributed(loaded, loaded_optimizer, str(tmp_path / "out/optimizer"))
    for (name, mine), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, loaded_optimizer.state[other][key]), (name, key)
    assert report["configs_edited"] == ["config.json"]
    assert (tmp_path / "out/trainer_state.json").read_text() == '{"global_step": 2}'


def test_pruned_again_it_is_composed_and_equal_counts_are_the_native_class_again(tmp_path: Path) -> None:
    model, _ = trained()
    save_shards(model, tmp_path / "source")
    second = Plan(
        layers={
            1: LayerPlan(experts_before=8, order=(7, 6, 5)),
            2: LayerPlan(experts_before=5, order=(4, 0, 2)),
        },
        criterion="second",
    )
    apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "once")
    report = apply_to_checkpoint(tmp_path / "once", second, tmp_path / "twice")
    assert report["files_copied"] == []  # not the plan, the report and the code of the first time

    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", output_loading_info=True)
    assert not any(problems.values())
    both = PLAN.compose(second)
    assert Plan.load(tmp_path / "twice/plan.json") == both
    prune_model_(describe_moe(model), both)
    assert type(loaded) is type(model)
    assert type(loaded).__name__ == "Qwen3MoeForCausalLM"
    assert not (tmp_path / "twice/modeling_secateur.py").exists()
    assert config_in(tmp_path / "twice") == config_in(tmp_path / "source") | {"num_local_experts": 3}
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_uniform_plan_changes_only_the_count_in_config_json(tmp_path: Path) -> None:
    save_shards(trained()[0], tmp_path / "source")
    plan = Plan(
        layers={layer: LayerPlan(experts_before=8, order=(1, 2, 5, 7)) for layer in range(3)}, criterion="uniform"
    )
    apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    assert config_in(tmp_path / "out") == config_in(tmp_path / "source") | {"num_local_experts": 4}


def config_in(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_shards_in_small_pieces_load_as_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained()
    save_shards(model, tmp_path / "source")
    monkeypatch.setattr(write, "FILE_BYTES", 5000)
    apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*.safetensors"))) > 20
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prune_model_(describe_moe(model), PLAN)
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), loaded.parameters(), strict=True))


BLOCK = "model.layers.0.mlp"
OTHER_AXES = {
    f"{BLOCK}.gate.weight": torch.arange(8.0 * 3).reshape(8, 3),
    f"{BLOCK}.gate.moe_statics.e_score_correction_bias": torch.arange(16.0).reshape(2, 8),
    f"{BLOCK}.experts.mlp.w1": torch.arange(8.0 * 5 * 2).reshape(8 * 5, 2),
}


@pytest.mark.parametrize("file_bytes", [2**20, 40])
def test_experts_on_axis_1_and_several_rows_an_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(write, "FILE_BYTES", file_bytes)
    order = [6, 1, 3]
    plan = Plan(layers={0: LayerPlan(experts_before=8, order=tuple(order))}, criterion="test")
    apply_to_checkpoint(save(OTHER_AXES, tmp_path / "source"), plan, tmp_path / "out")
    router, bias, flat = OTHER_AXES.values()
    expected = (router[order], bias[:, order], flat.reshape(8, 5, 2)[order].reshape(15, 2))
    for name, value in zip(OTHER_AXES, expected, strict=True):
        assert torch.equal(tensors_of(tmp_path / "out")[name], value)


def test_experts_out_of_order_on_axis_1_are_found_by_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write.new_rows

    def swapped(tensor: Any, change: Any, piece: Any) -> torch.Tensor:
        rows = real(tensor, change, piece)
        return rows.flip(1) if tensor.name.endswith("correction_bias") else rows

    monkeypatch.setattr(write, "new_rows", swapped)
    plan = Plan(layers={0: LayerPlan(experts_before=8, order=(6, 1, 3))}, criterion="test")
    save(OTHER_AXES, tmp_path / "source")
    with pytest.raises(SecateurError, match=r"verify: .*correction_bias differs from the source"):
        apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
