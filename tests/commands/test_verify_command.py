"""`secateur verify`: passes what is right, names what is not, and ends with status 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import cli
from secateur.model_folder.checks import contents, sample
from secateur.model_folder.checks.check import Check
from secateur.model_folder.checks.claims import verify_model
from secateur.model_folder.read import load as load_module
from secateur.model_folder.rewrite.apply import apply_to_model
from support.claims import ALL, detail, fallen, not_checked, outcome
from support.model_folders import plan_of, saved

PLAN = plan_of((0, [1, 3, 6]), (2, [2, 5, 7]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "source")
    apply_to_model(root / "source", PLAN, root / "out")
    return root


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders: Path, *options: object
) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    arguments = ["secateur", "verify", folders / "source", folders / "out", *options]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def checked(folders: Path, **options: Any) -> list[Check]:
    return verify_model(folders / "source", folders / "out", **options)


def change(folder: Path, ending: str, by: float = 1.0) -> str:
    """Change one number of one tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(ending):
                tensors[name].view(-1)[tensors[name].numel() // 2] += by
                save_file(tensors, path, metadata={"format": "pt"})
                return name
    raise AssertionError(ending)


def test_a_right_folder_passes_with_every_claim_in_words(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, monkeypatch, folders)
    assert status == 0
    assert out.count("passed: ") == len(ALL)
    assert "32 tokens, bit for bit" in out
    assert run(capsys, monkeypatch, folders, "--quiet") == (0, "", "")
    status, out, _ = run(capsys, monkeypatch, folders, "--json", "--tokens", "8", "--seed", "3")
    result = json.loads(out)
    assert (status, result["passed"], len(result["checks"])) == (0, True, len(ALL))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["experts.1.up_proj.weight", "mlp.gate.weight", "lm_head.weight"])
def test_one_changed_number_fails_by_its_name(
    ending: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = change(folders / "out", ending)
    status, out, _ = run(capsys, monkeypatch, folders)
    assert status == 1
    assert f"FAILED: every kept tensor equals its source byte for byte (1 tensors are not: {name} differs from" in out
    assert "FAILED: its logits are those of the source" in out


def test_a_change_in_the_last_places_is_seen_in_the_logits_as_well(folders: Path) -> None:
    change(folders / "out", "model.norm.weight", by=1e-6)
    checks = checked(folders)
    assert fallen(checks) == {"tensors", "logits"}
    assert "largest difference" in detail(checks, "logits")
    assert detail(checks, "logits").endswith("first after the last layer")


def test_two_experts_that_changed_places_fail_though_the_function_is_the_same(folders: Path) -> None:
    report = json.loads((folders / "out/report.json").read_text())
    report["plan"]["layers"]["0"]["order"] = [3, 1, 6]
    (folders / "out/report.json").write_text(json.dumps(report))
    assert fallen(checked(folders)) == {"tensors", "records"}


def test_another_source_fails(folders: Path) -> None:
    shutil.rmtree(folders / "source")
    saved("qwen3_moe", folders / "source")
    change(folders / "source", "layers.1.mlp.experts.4.down_proj.weight")
    assert {"tensors", "logits"} <= fallen(checked(folders))
    report = json.loads((folders / "out/report.json").read_text())
    report["plan"]["layers"]["0"] = {"experts_before": 16, "order": [1, 3, 6]}
    (folders / "out/report.json").write_text(json.dumps(report))
    checks = checked(folders)
    assert outcome(checks) == {"counts": False}
    assert "the plan is for another source, layers [0]" in checks[0].detail


def test_a_missing_and_an_unexpected_tensor_fail(folders: Path) -> None:
    names = {path: load_file(path) for path in (folders / "out").glob("*.safetensors")}
    index = json.loads((folders / "out/model.safetensors.index.json").read_text())
    for path, tensors in names.items():
        if "model.norm.weight" in tensors:
            tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
            save_file(tensors, path, metadata={"format": "pt"})
            index["weight_map"]["model.extra.weight"] = index["weight_map"].pop("model.norm.weight")
    (folders / "out/model.safetensors.index.json").write_text(json.dumps(index))
    checks = checked(folders, num_tokens=4)
    assert fallen(checks) == {"tensors", "loads"}
    assert "model.extra.weight is unexpected; model.norm.weight is missing" in detail(checks, "tensors")
    assert "'missing_keys': ['model.norm.weight']" in detail(checks, "loads")
    assert "'unexpected_keys': ['model.extra.weight']" in detail(checks, "loads")


def test_the_same_bytes_of_another_type_fail(folders: Path) -> None:
    for path in (folders / "out").glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)
            save_file(tensors, path, metadata={"format": "pt"})
    checks = checked(folders, num_tokens=0)
    assert fallen(checks) == {"tensors"}
    assert "1 tensors are not: model.norm.weight is I32 [32], unlike model.norm.weight" in detail(checks, "tensors")


def test_what_was_not_looked_at_is_said(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, monkeypatch, folders, "--tokens", "0")
    assert status == 0
    assert out.count("not checked: ") == 2
    assert out.count("(--tokens 0)") == 2
    monkeypatch.setattr(load_module, "free_memory", lambda: 1)
    checks = checked(folders)
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"})
    assert detail(checks, "speaks").endswith("of memory, 1 bytes are free")
    assert detail(checks, "logits") == "32 tokens, bit for bit, one layer in memory at a time"


def test_the_sample_may_be_a_text(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Tokenizer:
        first = 1

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            seen.extend(text for text in texts if text)
            return {"input_ids": [list(range(self.first, self.first + len(text.split()))) for text in texts]}

    monkeypatch.setattr(sample, "load_tokenizer", lambda folder: Tokenizer())
    (folders / "text.txt").write_text("one two three four five")
    checks = checked(folders, num_tokens=3, text=folders / "text.txt")
    assert seen == ["one two three four five"]
    assert fallen(checks) == set()
    assert detail(checks, "logits").startswith("3 tokens")
    monkeypatch.setattr(Tokenizer, "first", 62)
    with pytest.raises(ValueError, match=r"it makes a token of id 64, but its vocabulary is 64 by config\.json"):
        verify_model(folders / "source", folders / "out", num_tokens=3, text=folders / "text.txt")
    (folders / "text.txt").write_text("one")
    with pytest.raises(ValueError, match="1 tokens, expected at least 2"):
        verify_model(folders / "source", folders / "out", text=folders / "text.txt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "out/report.json").unlink(), "out: no report.json in it; expected a folder that `apply`"),
        (lambda root: (root / "out/report.json").write_text("{}"), "report.json: 'plan' is missing"),
        (lambda root: shutil.rmtree(root / "source"), "source: not a folder"),
        (lambda root: next((root / "out").glob("*.safetensors")).unlink(), "is missing"),
    ],
)
def test_what_cannot_be_verified_ends_with_status_2(
    spoil: Any, message: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(folders)
    status, _, err = run(capsys, monkeypatch, folders)
    assert (status, message in err) == (2, True), err


def test_a_sample_of_one_token_is_refused(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens in ("1", "-1"):
        status, _, err = run(capsys, monkeypatch, folders, f"--tokens={tokens}")
        assert (status, "expected 0, or 2 and more" in err) == (2, True)


@pytest.mark.parametrize("folder", ["source", "out"])
def test_a_folder_that_changes_while_it_is_verified_is_told(
    folder: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of its weight files, behind the back of the comparison: it was the same when it was compared."""
    original = contents.content_checks

    def change_after(*arguments: Any) -> list[Check]:
        found = original(*arguments)
        change(folders / folder, "o_proj.weight")
        return found

    monkeypatch.setattr(contents, "content_checks", change_after)
    status, out, err = run(capsys, monkeypatch, folders, "--tokens=0")
    assert (status, out) == (2, "")
    assert f"{folder}/model-" in err
    assert "it was changed while it was in use" in err
    assert err.strip().endswith("start again when nobody changes it")
