"""`secateur apply`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from secateur import cli
from secateur.plans import LayerPlan, Plan
from support.dcp_checkpoints import save

PLAN = Plan(layers={0: LayerPlan(experts_before=8, order=(6, 1, 3))}, criterion="test")
BLOCK = "model.layers.0.mlp"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    return write(tmp_path / "source", BLOCK)


def write(folder: Path, block: str) -> Path:
    return save({f"{block}.gate.weight": torch.rand(8, 4), f"{block}.experts.down_proj": torch.rand(8, 4, 3)}, folder)


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object
) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    arguments = ["secateur", "apply", folder / "source", folder / "plan.json", "--out", folder / "out", *options]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def test_it_says_what_it_did(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "config.json").write_text("{}")
    status, out, _ = run(capsys, monkeypatch, source.parent)
    assert status == 0
    assert "experts 8 -> 3 in 1 layers, 2 tensors changed" in out
    assert "layer 0: 8 -> 3" in out
    assert "config.json copied as it is" in out
    assert Plan.load(source.parent / "out/plan.json") == PLAN


def test_json_is_the_report_and_quiet_is_silence(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, monkeypatch, source.parent, "--dry-run", "--json")
    assert status == 0
    assert json.loads(out)["layers"]["0"]["experts_after"] == 3
    assert not (source.parent / "out").exists()
    assert run(capsys, monkeypatch, source.parent, "--dry-run")[1].startswith("would write")
    assert run(capsys, monkeypatch, source.parent, "--quiet") == (0, "", "")
    assert (source.parent / "out/report.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "2"], "layer 0: 3 experts after the plan, expected a multiple of 2"),
        (["--names", "megatron"], "expected auto, transformers, torchtitan, or a .json file"),
        (["--names", "torchtitan"], "no rule of the naming 'torchtitan' covers it"),
        (["--names", "missing.json"], "missing.json: cannot be read"),
        (["--ep", "0"], "'--ep'"),
    ],
)
def test_bad_options_end_with_status_2_and_no_folder(
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    status, _, err = run(capsys, monkeypatch, source.parent, *options)
    assert status == 2
    assert message in " ".join(err.split())
    assert not (source.parent / "out").exists()


def test_another_kind_of_folder_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/model.safetensors").touch()
    status, _, err = run(capsys, monkeypatch, tmp_path)
    assert status == 2
    assert "no training checkpoint in it; expected a .metadata file" in err


def test_names_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save(tmp_path / "plan.json")
    write(tmp_path / "source", "net.block_0.moe")
    naming = {
        "format": "secateur-names",
        "version": 1,
        "blocks": ["net.block_{layer}.moe"],
        "routers": {"gate.weight": {}},
        "experts": {"experts.down_proj": {}},
    }
    assert "fit none of transformers, torchtitan" in run(capsys, monkeypatch, tmp_path)[2]
    (tmp_path / "names.json").write_text(json.dumps(naming))
    assert run(capsys, monkeypatch, tmp_path, "--names", tmp_path / "names.json")[0] == 0


def test_a_refused_write_ends_with_status_1(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, _, err = run(capsys, monkeypatch, source.parent)
    assert (status, "No space left on device" in err) == (1, True)
    assert not (source.parent / "out").exists()


def test_an_error_about_the_plan_names_its_file(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = next(iter(PLAN.layers.values()))
    Plan(layers={9: layer}, criterion="test").save(source.parent / "plan.json")
    status, _, err = run(capsys, monkeypatch, source.parent)
    assert (status, f"{source.parent}/plan.json: layer 9 is not a MoE layer" in err) == (2, True)
