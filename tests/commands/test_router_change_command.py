"""`plan` and `prune` with --pretrained: two models in, no data, the experts that fine-tuning did not reach go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import SecateurError
from secateur.model_folder.measure.router_change import router_changes
from secateur.plans import Plan
from support.claims import ALL, outcome
from support.tiny_models import tiny_model
from support.tuned_folders import lora_of, routers, write_adapter

GROWTH = torch.tensor([0.3, -0.1, 0.0, 0.5, -0.4, 0.2, 0.1, -0.2])  # of each expert's row; layers turn it on by one
KEPT = {4: [0, 3, 5, 6], 6: [0, 1, 2, 3, 5, 6]}  # in layer 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, whose router rows all have norm 1, and tuned, whose rows have norm 1 + GROWTH."""
    root = tmp_path_factory.mktemp("router-change")
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for router in routers(model).values():
            router /= router.norm(dim=1, keepdim=True)
        model.save_pretrained(root / "base")
        for layer, router in routers(model).items():
            router *= 1 + GROWTH.roll(layer)[:, None]
    model.save_pretrained(root / "tuned")
    return root


def run(*words: str | Path) -> dict[str, Any]:
    ended = CliRunner().invoke(app, [*map(str, words), "--json"])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == 0
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


@pytest.mark.parametrize("keep", KEPT)
def test_the_experts_whose_rows_grew_least_go(folders: Path, tmp_path: Path, keep: int) -> None:
    words = ["plan", folders / "tuned", "--pretrained", folders / "base", "--keep", str(keep)]
    result = run(*words, "--out", tmp_path / "plan.json")
    assert result["criterion"] == "router_norm_change"
    plan = Plan.load(tmp_path / "plan.json")
    for layer, one in plan.layers.items():
        assert list(one.order) == sorted((expert + layer) % 8 for expert in KEPT[keep])


def test_prune_needs_no_data_and_its_result_passes_every_check(folders: Path, tmp_path: Path) -> None:
    result = run(
        "prune", folders / "tuned", "--pretrained", folders / "base", "--keep", "0.5", "--out", tmp_path / "out"
    )
    assert result["verified"]["passed"]
    assert outcome(result["verified"]["checks"]) == dict.fromkeys(ALL, True)
    assert Plan.load(tmp_path / "out" / "plan.json").layers[0].order == tuple(KEPT[4])
    assert not (tmp_path / "out" / "observed").exists()


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_model_that_changes_while_it_is_compared_is_an_error(
    folders: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in ("base", "tuned"):
        shutil.copytree(folders / one, tmp_path / one)

    def changed(*values: Any) -> Any:
        found = router_changes(*values)
        os.utime(tmp_path / name / "config.json", (1, 1))
        return found

    monkeypatch.setattr("secateur.model_folder.choice.router_changes", changed)
    words = ["plan", tmp_path / "tuned", "--pretrained", tmp_path / "base", "--keep", "0.5"]
    with pytest.raises(SecateurError, match=rf"{name}/config\.json: it was changed while it was in use"):
        run(*words, "--out", tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_a_model_that_does_not_belong_is_refused_and_leaves_nothing(folders: Path, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "other")
    words = ["prune", folders / "tuned", "--keep", "0.5", "--out", tmp_path / "out", "--pretrained"]
    with pytest.raises(SecateurError, match=r"is a 'qwen3_moe' and .*other a 'mixtral', expected one family"):
        run(*words, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_plan_from_an_adapter_is_that_of_the_merged_model(folders: Path, tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    tensors, merged = lora_of(tiny_model("qwen3_moe"))
    merged.save_pretrained(tmp_path / "merged")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    plans = [
        run("plan", source, "--pretrained", tmp_path / "base", "--keep", "0.5", "--dry-run")["plan"]["layers"]
        for source in (adapter, tmp_path / "merged")
    ]
    assert plans[0] == plans[1]
    with pytest.raises(SecateurError, match="a LoRA adapter; name the folder of the model"):
        run("plan", adapter, "--keep", "0.5", "--dry-run")
    with pytest.raises(SecateurError, match="merge it into its model"):
        run("prune", adapter, "--pretrained", tmp_path / "base", "--keep", "0.5", "--out", tmp_path / "out")
    with pytest.raises(SecateurError, match="criterion 'aimer' does not compare two models"):
        run("plan", adapter, "--pretrained", tmp_path / "base", "--criterion", "aimer", "--keep", "0.5", "--dry-run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tuned", "--criterion", "router_norm_change"], "compares a fine-tuned model with the one it was made from"),
        (["tuned", "--pretrained", "tuned"], "its routers are those of"),
        (["tuned", "--pretrained", "nowhere"], "nowhere: not a folder"),
    ],
)
def test_what_is_missing_is_named(folders: Path, words: list[str], message: str) -> None:
    given = [str(folders / word) if word in ("tuned", "base", "nowhere") else word for word in words]
    with pytest.raises(SecateurError, match=message):
        run("plan", *given, "--keep", "0.5", "--dry-run")
