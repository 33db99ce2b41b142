"""The same command again finds its result there, byte for byte, and is done; anything else there is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.folder_kinds.apply import apply
from support.model_folders import contents, plan_of, saved

PLAN = plan_of((0, [6, 1, 3]), (2, [2, 5, 7]))  # layers that differ: every kind of file is written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "source")
    (root / "source/README.md").write_text("# Mine\n")
    (root / "source/more").mkdir()
    (root / "source/more/vocabulary.txt").write_text("a\nb\n")
    apply(root / "source", PLAN, root / "out", undo=root / "undo")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    for name in ("out", "undo"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "source").symlink_to(made / "source")
    return tmp_path


def again(made: Path, root: Path, plan: object = PLAN, *, undo: bool = True, **options: object) -> dict[str, object]:
    side = root / "undo" if undo else None
    return apply(made / "source", plan, root / "out", undo=side, **options).to_json()  # type: ignore[arg-type]


def listed(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("undo", [True, False])
def test_the_same_command_again_finds_its_result_and_changes_nothing(made: Path, root: Path, undo: bool) -> None:
    before = contents(root / "out"), contents(root / "undo")
    report = json.loads((root / "out/report.json").read_text())
    assert again(made, root, undo=undo) == report | {"is_there": True}
    assert (contents(root / "out"), contents(root / "undo")) == before
    assert listed(root) == ["out", "source", "undo"]


def test_every_byte_of_every_kind_of_file_counts(made: Path, root: Path) -> None:
    kinds = {
        (name, path.suffix): path for name in ("out", "undo") for path in (root / name).rglob("*") if path.is_file()
    }
    assert {kind for _, kind in kinds} >= {".safetensors", ".json", ".md", ".html", ".py", ".txt"}
    for (_, kind), path in kinds.items():
        content = path.read_bytes()
        changes = [content[:-1] + bytes([content[-1] ^ 1])]
        changes += [content[:-1], content + b" "] if kind == ".safetensors" else []
        for changed in changes:
            path.write_bytes(changed)
            with pytest.raises(SecateurError):
                again(made, root)
        path.write_bytes(content)
    assert again(made, root)["is_there"] is True


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte in the middle": (lambda root: flip(max((root / "out").glob("*.safetensors"))), "not .* would be another$"),
    "a file more": (lambda root: (root / "undo/mine").touch(), "not .*undo/mine would not be written$"),
    "no undo folder": (lambda root: shutil.rmtree(root / "undo"), "not an empty folder$"),
    "no report": (lambda root: (root / "out/report.json").unlink(), "not an empty folder$"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_there_otherwise_is_refused_and_left_alone(made: Path, root: Path, change: str) -> None:
    apply_it, message = CHANGES[change]
    apply_it(root)
    before = contents(root / "out")
    with pytest.raises(SecateurError, match=f"it is there already and {message}"):
        again(made, root)
    assert contents(root / "out") == before
    assert ".partial" not in "".join(listed(root))


def test_another_plan_other_options_and_a_dry_run_are_refused_at_once(
    made: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.model_folder.rewrite.apply.write_weights", lambda *_: pytest.fail("it was compared"))
    other = plan_of((0, [6, 1, 3]), (2, [2, 5, 6]))
    for plan, options in ((other, {}), (PLAN, {"experts_from": "files"})):
        with pytest.raises(SecateurError, match="another plan or other options"):
            again(made, root, plan, **options)
    with pytest.raises(SecateurError, match=r"not an empty folder$"):
        again(made, root, dry_run=True)
