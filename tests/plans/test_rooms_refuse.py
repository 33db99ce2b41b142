"""A plan that mixes experts, takes neurons or maps slots is refused by name in every room that cannot apply it yet."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.undo import RECORD, SEAL, restore
from secateur.plans import FREE, MAPPED, REROUTE, ZERO_SLOT, LayerPlan, Matrix, Neurons, Plan, Source
from secateur.surgery.module import prune_model_
from secateur.surgery.oracle import barred_experts
from secateur.surgery.zero_slots import remove_into_zero_slots_
from secateur.training_checkpoint.apply import apply_to_checkpoint
from support.dcp_checkpoints import save
from support.model_folders import contents, plan_of, saved
from support.tiny_models import everything, tiny_model

FAMILY = "qwen3_moe"
PAIR = (Source(expert=0, weight=0.5), Source(expert=1, weight=0.5))
PART = tuple((Source(expert=expert, neurons=Neurons([0])),) for expert in range(8))
WORDS = "this release cannot apply others"


def _plan(**layer: Any) -> Plan:
    kept = layer.pop("removed", None)
    layer = {"order": tuple(range(8)), **layer}
    return Plan(layers={1: LayerPlan(experts_before=8, **layer)}, criterion="test", removed=kept)


# what a plan does that no room can -> the plan
BEYOND = {
    "layer 1: the new expert 0 is mixed from 0, 1": _plan(sources={0: PAIR}, order=(0, *range(2, 8))),
    "layer 1: of expert 0 some neurons are kept": _plan(sources=dict(enumerate(PART)), width_before=4),
    "layer 1: 0.down_proj was solved for": _plan(solved={"0.down_proj": Matrix(np.ones((1, 1)))}),
    "slots of routers are mapped": _plan(order=(0, 1, 2, 3), removed=MAPPED),
}


@pytest.mark.parametrize(("what", "plan"), BEYOND.items(), ids=["sources", "neurons", "solved", "mapped"])
def test_a_live_model_is_left_as_it_was(what: str, plan: Plan) -> None:
    model = tiny_model(FAMILY)
    before = everything(model)
    for apply in (
        lambda: prune_model_(describe_moe(model), plan),
        lambda: barred_experts(describe_moe(model), plan).__enter__(),
        lambda: remove_into_zero_slots_(model, plan),
    ):
        with pytest.raises(SecateurError, match=f"{what}.*{WORDS}"):
            apply()
    after = everything(model)
    assert all(torch.equal(before[name], value) for name, value in after.items() if isinstance(value, torch.Tensor))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    saved(FAMILY, folder)
    return folder


@pytest.mark.parametrize(("what", "plan"), BEYOND.items(), ids=["sources", "neurons", "solved", "mapped"])
def test_a_folder_and_a_checkpoint_are_refused_before_anything_is_written(
    what: str, plan: Plan, source: Path, tmp_path: Path
) -> None:
    checkpoint = save({"model": {"step": torch.ones(1)}}, tmp_path / "checkpoint")
    for apply in (apply_to_model, apply_to_checkpoint):
        with pytest.raises(SecateurError, match=f"{what}.*{WORDS}"):
            apply(source if apply is apply_to_model else checkpoint, plan, tmp_path / "out")  # type: ignore[operator]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_report_and_an_undo_folder_of_a_later_release_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    out, undo = tmp_path / "out", tmp_path / "undo"
    apply_to_model(source, plan_of((1, [0, 2, 3, 4, 5, 6, 7])), out, undo=undo)
    later = BEYOND["layer 1: the new expert 0 is mixed from 0, 1"].to_json()
    reads: list[tuple[Path, Callable[[], object]]] = [
        (out / "report.json", lambda: verify_model(source, out, num_tokens=0)),
        (undo / RECORD, lambda: restore(out, undo, tmp_path / "again")),
    ]
    before = contents(out)
    for path, read in reads:
        content = {**json.loads(path.read_text()), "plan": later}
        if content.pop(SEAL, None):
            content[SEAL] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content))
        with pytest.raises(SecateurError, match=f"{path.name}.*mixed from 0, 1.*{WORDS}"):
            read()
    assert {name for name, data in contents(out).items() if data != before[name]} == {"report.json"}


@pytest.mark.parametrize(("order", "num_side_files"), [([0, 2, 3, 4, 5, 6, 7], 1), ([1, 2, 3, 4, 5, 6, 7], 0)])
def test_the_arrays_of_an_earlier_plan_go_with_it_and_come_back(
    order: list[int], num_side_files: int, source: Path, tmp_path: Path
) -> None:
    whole, out, undo = (tmp_path / name for name in ("whole", "out", "undo"))
    shutil.copytree(source, whole)
    earlier = _plan(sources={0: (Source(expert=0, neurons=Neurons([1, 0])),)}, width_before=2)
    earlier.save(whole / "plan.json")
    plan = plan_of((1, order))
    apply_to_model(whole, plan, out, undo=undo)
    assert Plan.load(out / "plan.json").layers == earlier.compose(plan).layers
    assert len(list(out.glob("plan.*.tensors"))) == num_side_files
    restore(out, undo, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


def test_plans_that_the_rooms_take_are_not_beyond_them() -> None:
    for removed in (None, REROUTE, ZERO_SLOT):
        assert _plan(order=(3, 0), removed=removed).beyond_copies() is None
    half = LayerPlan(experts_before=8, order=(3,), sources={0: (Source(expert=3, weight=0.5),)})
    free = Plan(layers={1: half}, criterion="test", weights=FREE)
    assert free.beyond_copies() == "layer 1: the new expert 0 is mixed from 3"
