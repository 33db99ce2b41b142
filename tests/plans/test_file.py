"""A plan with sources reads back from its two files as it was, and files that do not belong together are refused."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.records import as_record
from secateur.plans import FREE, MAPPED, MEAN, ROWS, WEIGHTS, LayerPlan, Matrix, Neurons, Plan, Source
from secateur.plans.file import SourcesEntry
from secateur.plans.plan import MEANINGS
from support.made_plans import plan_of, random_layer
from support.model_folders import contents

MERGED = Plan(
    layers={
        7: LayerPlan(
            experts_before=3,
            order=(2, 0),
            sources={
                0: (
                    Source(expert=1, weight=0.1, neurons=Neurons([2, 0])),
                    Source(expert=2, weight=0.9, neurons=Neurons([0, 1])),
                ),
                1: (Source(expert=0, neurons=Neurons([1, 2])),),
            },
            width_before=3,
            solved={"0.down_proj": Matrix(np.float32([[1, 2]])), "router": Matrix(np.ones((2, 4)))},
        ),
        2: LayerPlan(experts_before=4, order=(3, 1)),
    },
    criterion="merge",
    removed="zero-slot",
    rows=MEAN,
)


def test_json_is_the_documented_format() -> None:
    data = MERGED.to_json()
    digest = data.pop("side_sha256")
    assert isinstance(digest, str)
    assert data == {
        "format": "secateur-plan",
        "version": 2,
        "criterion": "merge",
        "details": {},
        "stats_digest": None,
        "removed": "zero-slot",
        "rows": "mean",
        "layers": {
            "2": {"experts_before": 4, "order": [3, 1]},
            "7": {
                "experts_before": 3,
                "order": [2, 0],
                "sources": {
                    "0": [
                        {"expert": 1, "weight": 0.1, "neurons": 0},
                        {"expert": 2, "weight": 0.9, "neurons": 1},
                    ],
                    "1": [{"expert": 0, "weight": 1.0, "neurons": 2}],
                },
                "width_before": 3,
                "solved": ["0.down_proj", "router"],
            },
        },
    }


def test_a_saved_plan_reads_back_equal_and_its_arrays_are_beside_it(tmp_path: Path) -> None:
    MERGED.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == MERGED
    side = side_file(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert {name: array.tolist() for name, array in load_file(side).items()} == {
        "layers.7.neurons": [[2, 0], [0, 1], [1, 2]],
        "layers.7.solved.0.down_proj": [[1, 2]],
        "layers.7.solved.router": [[1] * 4] * 2,
    }
    digest = json.loads((tmp_path / "plan.json").read_text())["side_sha256"]
    assert digest == _digest(side)
    assert side.name == f"plan.{digest[:16]}.tensors"
    before = contents(tmp_path)
    MERGED.save(tmp_path / "plan.json")
    assert contents(tmp_path) == before, "the same plan has the same bytes"


def test_a_link_to_a_plan_finds_its_arrays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    MERGED.save(tmp_path / "runs" / "plan.json")
    (tmp_path / "current.json").symlink_to("runs/plan.json")
    assert Plan.load(tmp_path / "current.json") == MERGED
    OTHER.save(tmp_path / "current.json")  # takes the place of the link
    assert (Plan.load(tmp_path / "current.json"), Plan.load(tmp_path / "runs" / "plan.json")) == (OTHER, MERGED)


def test_any_plan_reads_back_equal(tmp_path: Path) -> None:
    rng = random.Random(0)
    versions = set()
    for _ in range(60):
        plan = replace(plan_of(random_layer(rng, 4, 3)), weights=rng.choice(["convex", FREE]))
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        versions.add(plan.to_json()["version"])
    assert versions == {1, 2}


def test_weights_alone_need_no_side_file(tmp_path: Path) -> None:
    pair = (Source(expert=0, weight=0.3), Source(expert=1, weight=0.7))
    plan = plan_of(LayerPlan(experts_before=2, order=(1,), sources={0: pair}))
    plan.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.from_json(plan.to_json())


def test_a_rule_that_version_1_does_not_know_is_written_as_version_2(tmp_path: Path) -> None:
    copies = plan_of(LayerPlan(experts_before=2, order=(1,)))
    for rule in ({"removed": MAPPED}, {"weights": FREE}):
        plan = replace(copies, **rule)  # type: ignore[arg-type]
        assert plan.to_json()["version"] == 2
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan


def test_a_side_file_is_never_written_over_something_else(tmp_path: Path) -> None:
    MERGED.save(tmp_path / "plan.json")
    side = side_file(tmp_path)
    save_file({"x": np.ones(1)}, side)
    before = contents(tmp_path)
    with pytest.raises(SecateurError, match=r"the arrays of the plan go there, but it is something else"):
        MERGED.save(tmp_path / "plan.json")
    assert contents(tmp_path) == before


OTHER = replace(MERGED, layers={7: replace(MERGED.layers[7], solved={"router": Matrix(np.zeros((2, 4)))})})


def test_a_plan_that_is_written_over_another_is_whole_and_leaves_no_arrays_of_the_other(
    tmp_path: Path,
) -> None:
    for plan in (MERGED, OTHER, Plan.identity({0: 2}), MERGED):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert len(list(tmp_path.iterdir())) == (1 if plan.is_copy else 2)
    OTHER.save(tmp_path / "plan.reap")  # another plan whose name differs in its ending only
    assert (Plan.load(tmp_path / "plan.json"), Plan.load(tmp_path / "plan.reap")) == (MERGED, OTHER)


@pytest.mark.parametrize("old", [MERGED, Plan.identity({0: 2})], ids=["with arrays", "without"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_plan_stays_whole_until_the_new_one_is_there(
    old: Plan, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a kill, at the arrays or at the JSON of the new plan."""
    path = tmp_path / "plan.json"
    old.save(path)
    calls = itertools.count(1)

    def full(target: Path, content: bytes | str) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "no space left")
        atomic_write(target, content)

    monkeypatch.setattr("secateur.plans.file.atomic_write", full)
    with pytest.raises(OSError, match="no space left"):
        OTHER.save(path)
    assert Plan.load(path) == old


def test_two_who_write_one_plan_leave_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writes both its files between the two of this one."""
    path = tmp_path / "plan.json"

    def interrupted(target: Path, content: bytes | str) -> None:
        if target == path:
            monkeypatch.undo()
            OTHER.save(path)
        atomic_write(target, content)

    monkeypatch.setattr("secateur.plans.file.atomic_write", interrupted)
    MERGED.save(path)
    assert Plan.load(path) == MERGED


def test_a_plan_whose_side_file_is_not_at_hand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="it lists neurons or solved matrices, whose side file is not at hand"):
        Plan.from_json(MERGED.to_json())
    with pytest.raises(SecateurError, match="plan: its side file is not the one that was written with it"):
        Plan.from_json(MERGED.to_json(), side=b"")
    MERGED.save(tmp_path / "plan.json")
    side = side_file(tmp_path)
    side.rename(tmp_path / "elsewhere")
    for make, why in (
        (lambda: None, "is missing"),
        (lambda: os.mkfifo(side), "it is a pipe"),
        (lambda: (side.unlink(), side.mkdir()), "(is missing|it is a folder)"),
    ):
        make()
        with pytest.raises(SecateurError, match=rf"plan file .*plan.json: its side file plan\..*\.tensors.*{why}"):
            Plan.load(tmp_path / "plan.json")


def test_a_side_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    MERGED.save(tmp_path / "plan.json")
    side = side_file(tmp_path)
    side.write_bytes(side.read_bytes()[:-1] + b"?")
    with pytest.raises(
        SecateurError, match=r"plan file .*plan.json: plan: its side file is not the one that was written"
    ):
        Plan.load(tmp_path / "plan.json")


def side_file(folder: Path) -> Path:
    (found,) = folder.glob("plan.*.tensors")
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rewrite(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], form: str | None = None) -> Path:
    """A plan whose two files were changed by hand, with the digest that belongs to them."""
    MERGED.save(tmp_path / "plan.json")
    path, side = tmp_path / "plan.json", side_file(tmp_path)
    data, arrays = json.loads(path.read_text()), load_file(side)
    change(data, arrays)
    save_file(arrays, side, metadata={"format": form or "secateur-plan-arrays/1"})
    return renamed(data, side)


def renamed(data: dict[str, Any], side: Path) -> Path:
    """The plan, saying and named by the digest that its side file has now."""
    digest = _digest(side)
    side.rename(side.with_name(f"plan.{digest[:16]}.tensors"))
    (side.parent / "plan.json").write_text(json.dumps({**data, "side_sha256": digest}))
    return side.parent / "plan.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, arrays: arrays.pop("layers.7.neurons"), "layer 7: the side file has no layers.7.neurons"),
        (lambda data, arrays: arrays.pop("layers.7.solved.router"), "the side file has no layers.7.solved.router"),
        (
            lambda data, arrays: arrays.update({"layers.9.neurons": np.int32([[0]])}),
            r"its side file has \['layers.9.neurons'\], which no layer names",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.neurons": np.int32([[0, 1]])}),
            r"layer 7: neurons of shape \(1, 2\), expected 3 lists of one length",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.neurons": np.ones((3, 2), np.float32)}),
            "layers.7.neurons is float32, expected int32",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.neurons": np.int64([[2, 0], [0, 1], [1, 2]])}),
            "'layers.7.neurons' is I64, expected one of I32, F32, F64",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.neurons": np.int32([[2, 0], [0, 0], [1, 2]])}),
            r"layer 7: neurons: \[0\] are listed more than once",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.solved.router": np.full((2, 4), np.nan)}),
            "layer 7: a solved matrix: an entry is not finite",
        ),
        (
            lambda data, arrays: data["layers"]["7"]["sources"]["0"][0].update(neurons=9),
            "layer 7: a source names a list of neurons that the side file does not have",
        ),
        (
            lambda data, arrays: data["layers"]["7"]["sources"]["0"][0].update(neurons=1),
            "layer 7: 2 sources name list 1 of neurons, expected each list once",
        ),
        (
            lambda data, arrays: data["layers"]["7"].update(width_before=2),
            "neuron 2 is out of range, expected 0 to 1",
        ),
        (
            lambda data, arrays: arrays.update({"layers.7.solved.router": np.ones([1] * 40)}),
            "'layers.7.solved.router' has 40 axes, expected 2",
        ),
        (
            lambda data, arrays: [one.update(weight=1e308) for one in data["layers"]["7"]["sources"]["0"]],
            "weights .* sum up to inf, expected 1",
        ),
        (lambda data, arrays: data.update(version=1), "'layers.7.solved' is unknown, expected experts_before, order"),
        (lambda data, arrays: data.update(version=3), "'version' is 3, expected one of 1, 2"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = _rewrite(tmp_path, change)
    with pytest.raises(SecateurError, match=message) as caught:
        Plan.load(path)
    assert "plan.json" in str(caught.value)


def test_a_file_of_another_kind_is_no_side_file(tmp_path: Path) -> None:
    path = _rewrite(tmp_path, lambda data, arrays: None, form="secateur-stats/3")
    with pytest.raises(SecateurError, match="format 'secateur-stats/3', expected 'secateur-plan-arrays/1'"):
        Plan.load(path)


def test_a_truncated_side_file_is_refused(tmp_path: Path) -> None:
    MERGED.save(tmp_path / "plan.json")
    side = side_file(tmp_path)
    side.write_bytes(side.read_bytes()[:-1])
    path = renamed(json.loads((tmp_path / "plan.json").read_text()), side)
    with pytest.raises(SecateurError, match="not a whole safetensors file"):
        Plan.load(path)


def test_the_page_of_plans_runs_and_names_every_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert Plan.load("plan.json").layers[0].order == (3, 0, 5)
    assert names["merged"].layers[0].absorbed == (1,)
    assert all(f"`{word}`" in page for word in (*MEANINGS, *ROWS, *WEIGHTS))
    sources = re.search(r'"sources": .*?\}\]\},\s+"width_before": 768, "solved": \["0.down_proj"\]', page, re.DOTALL)
    assert sources
    as_record({"experts_before": 4, "order": [3], **json.loads(f"{{{sources[0]}}}")}, SourcesEntry, "the page")
