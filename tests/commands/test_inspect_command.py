"""`secateur inspect`, and `secateur apply` on models, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur import cli
from secateur.model_folder.read.inspect import inspect
from support.model_folders import config_of, contents, plan_of, saved, tensors_of, write
from support.tiny_models import NUM_EXPERTS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    saved("deepseek_v3 grouped", folder)
    return folder


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    monkeypatch.setattr("sys.argv", ["secateur", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def test_it_says_what_the_tensors_say(source: Path) -> None:
    found = inspect(source).to_json()
    tensors = tensors_of(source)
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    routers = sum(tensor.nbytes for name, tensor in tensors.items() if ".mlp.gate." in name)
    assert found["bytes"] == {
        "experts": experts,
        "routers": routers,
        "rest": sum(tensor.nbytes for tensor in tensors.values()) - experts - routers,
    }
    assert found["bytes_per_expert"] == {"1": (experts + routers) // 16, "2": (experts + routers) // 16}
    assert (found["model_type"], found["class"]) == ("deepseek_v3", "DeepseekV3ForCausalLM")
    assert (found["decoder_layers"], found["experts"]) == (3, {"1": 8, "2": 8})
    assert (found["top_k"], found["groups"], found["least_experts"], found["shared_experts"]) == (2, 2, 4, 1)
    assert (found["tensors"], found["dtypes"], found["quantisation"]) == (len(tensors), {"F32": len(tensors)}, None)
    assert len(found["limits"]) == 2


def test_a_stacked_tensor_is_shared_out_among_its_experts(tmp_path: Path) -> None:
    saved("gpt_oss", tmp_path / "source")
    found = inspect(tmp_path / "source").to_json()
    assert set(found["bytes_per_expert"].values()) == {
        (found["bytes"]["experts"] + found["bytes"]["routers"]) // (3 * NUM_EXPERTS)
    }


def test_it_prints_words_or_json(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, monkeypatch, "inspect", source)
    assert status == 0
    assert "deepseek_v3 (DeepseekV3ForCausalLM)" in out
    assert "2 of 3 layers have experts, 8 each, top-k 2, 2 router groups, 1 shared" in out
    assert "each of the 2 router groups keeps the same number" in out
    status, out, _ = run(capsys, monkeypatch, "inspect", source, "--json")
    assert (status, json.loads(out)) == (0, inspect(source).to_json())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"model_type": "jetmoe"}, "'jetmoe' is not supported: its attention holds a second"),
        ("qwen3_moe", {"model_type": "deepseek_v4"}, "by a table of expert ids"),
        ("qwen3_moe", {"num_local_experts": None}, "no count of routed experts"),
    ],
)
def test_what_cannot_be_pruned_is_said_with_the_reason_and_status_2(
    name: str,
    changes: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved(name, tmp_path / "full")
    write(tmp_path / "source", config_of(name, **changes), tensors_of(tmp_path / "full"))
    status, _, err = run(capsys, monkeypatch, "inspect", tmp_path / "source")
    assert (status, message in err) == (2, True), err


@pytest.mark.slow
def test_a_model_is_pruned_verified_and_restored_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan, out, undo = (tmp_path / name for name in ("source", "plan.json", "out", "undo"))
    saved("qwen3_moe", source)
    (source / "old.bin").touch()
    plan_of(*((layer, [0, 3, 5]) for layer in range(3))).save(plan)
    status, text, _ = run(capsys, monkeypatch, "apply", source, plan, "--out", out, "--dry-run")
    assert (status, "would write" in text, out.exists()) == (0, True, False)
    status, text, _ = run(capsys, monkeypatch, "apply", source, plan, "--out", out, "--undo", undo)
    assert status == 0
    assert "experts 24 -> 9 in 3 layers" in text
    assert "layer 0: 8 -> 3" in text
    assert "left out, weights of the unpruned model in other forms: old.bin" in text
    assert run(capsys, monkeypatch, "verify", source, out, "--tokens", 4)[0] == 0
    (source / "old.bin").unlink()
    status, text, _ = run(capsys, monkeypatch, "apply", out, undo, "--out", tmp_path / "again")
    assert (status, "restored" in text) == (0, True)
    assert contents(tmp_path / "again") == contents(source)
    status, text, _ = run(capsys, monkeypatch, "apply", out, undo, "--out", tmp_path / "third", "--json")
    assert (status, len(json.loads(text)["files"])) == (0, len(contents(source)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", "transformers"], "--names transformers: for a training checkpoint, but"),
        (["--mtp", "both"], "--mtp both: expected whole or drop"),
        (["--ep", "2"], "expected a multiple of 2 (--ep)"),
    ],
)
def test_options_that_do_not_fit_a_model_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved("qwen3_moe", tmp_path / "source")
    plan_of((0, [0, 3, 5])).save(tmp_path / "plan.json")
    status, _, err = run(
        capsys, monkeypatch, "apply", tmp_path / "source", tmp_path / "plan.json", "--out", tmp_path / "out", *options
    )
    assert (status, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_undo_is_for_models_and_restoring_takes_no_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from support.dcp_checkpoints import save

    block = "model.layers.0.mlp"
    save(
        {f"{block}.gate.weight": torch.rand(8, 4), f"{block}.experts.down_proj": torch.rand(8, 4, 3)}, tmp_path / "dcp"
    )
    plan_of((0, [0, 3, 5])).save(tmp_path / "plan.json")
    arguments = ("apply", tmp_path / "dcp", tmp_path / "plan.json", "--out", tmp_path / "out")
    for option in (["--undo", tmp_path / "undo"], ["--mtp", "drop"]):
        status, _, err = run(capsys, monkeypatch, *arguments, *option)
        assert (status, "is a training checkpoint" in err) == (2, True)
    (tmp_path / "undo").mkdir()
    (tmp_path / "undo/undo.json").write_text("{}")
    arguments = ("apply", tmp_path / "dcp", tmp_path / "undo", "--out", tmp_path / "out")
    status, _, err = run(capsys, monkeypatch, *arguments, "--ep", "2")
    assert (status, "takes no other option" in err) == (2, True)
