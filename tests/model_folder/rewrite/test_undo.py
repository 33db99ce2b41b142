"""Pruned folder + undo folder = the source, byte for byte; folders that do not belong together are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import SecateurError
from secateur.files.new_folder import copy_file
from secateur.model_folder.rewrite import undo as undo_module
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.pieces import Copy, NewTensor, kept_tensors
from secateur.model_folder.rewrite.undo import holds_undo, restore
from secateur.plans import Plan
from support.crash_points import CrashPoint, changes_of, forked
from support.long_tests import ARE_RUN
from support.model_folders import INDEX, contents, plan_of, saved, sealed, tensors_of

STRIDE = 5 if ARE_RUN else 15  # between the moments of a kill; `make faults` takes them all
PLAN = plan_of((0, [6, 1, 3]), (2, [2, 5, 7]))

OTHER_BYTES = r"SHA-256 .*; one of .*undo/headers/.*, .*model.* was changed, or the folders do not belong together"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, out and undo of one pruning that changes every kind of file."""
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "source")
    (root / "source/README.md").write_text("# Mine\n")
    (root / "source/plan.json").write_text(json.dumps(plan_of((0, list(range(8))), experts=9).to_json()))
    (root / "source/more").mkdir()
    (root / "source/more/vocabulary.txt").write_text("a\nb\n")
    apply_to_model(root / "source", PLAN, root / "out", undo=root / "undo")
    return root


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def refused(folders: Path, message: str) -> None:
    before = sorted(path.name for path in folders.iterdir())
    with pytest.raises(SecateurError, match=message):
        restore(folders / "out", folders / "undo", folders / "again")
    assert sorted(path.name for path in folders.iterdir()) == before


def test_the_source_comes_back_byte_for_byte(folders: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = restore(
        folders / "out", folders / "undo", folders / "again", on_bytes=lambda done, total: seen.append((done, total))
    )
    source = contents(folders / "source")
    assert contents(folders / "again") == source
    assert sorted(report["files"]) == sorted(source)
    weights = sum(tensor.nbytes for tensor in tensors_of(folders / "source").values())
    assert (report["bytes"], seen[-1]) == (weights, (weights, weights))


def test_what_is_saved_is_the_plan_that_was_given_without_the_layers_it_leaves_out(folders: Path) -> None:
    for path in (folders / "out/report.json", folders / "undo/undo.json"):
        assert json.loads(path.read_text())["plan"] == PLAN.to_json()
    assert Plan.load(folders / "out/plan.json").layers.keys() == PLAN.layers.keys() == {0, 2}


def test_the_undo_folder_holds_the_dropped_experts_under_their_old_names_and_no_other(folders: Path) -> None:
    source = tensors_of(folders / "source")
    kept = {0: {6, 1, 3}, 1: set(range(8)), 2: {2, 5, 7}}
    dropped = {layer: set(range(8)) - of_layer for layer, of_layer in kept.items()}
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer, experts in dropped.items()
        for expert in experts
        for name in ("gate", "up", "down")
    }
    found = {name: value for path in (folders / "undo").glob("dropped*") for name, value in load_file(path).items()}
    routers = {f"model.layers.{layer}.mlp.gate.weight": sorted(dropped[layer]) for layer in (0, 2)}
    assert found.keys() == expected | routers.keys()
    assert all(torch.equal(found[name], source[name]) for name in expected)
    assert all(torch.equal(found[name], source[name][rows]) for name, rows in routers.items())
    assert holds_undo(folders / "undo")
    assert not holds_undo(folders / "out")


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx", "ernie4_5_moe", "inkling_text"])
def test_rows_of_every_packing_come_back(name: str, tmp_path: Path) -> None:
    from secateur.families import describe_moe
    from support.tiny_models import random_plan

    moe = describe_moe(saved(name, tmp_path / "source"))
    plan = random_plan(moe, ascending=False)
    apply_to_model(tmp_path / "source", plan, tmp_path / "out", undo=tmp_path / "undo")
    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")


def test_folders_of_two_prunings_do_not_make_a_source(folders: Path) -> None:
    other = plan_of((0, [6, 1, 4]), (2, [2, 5, 7]))
    shutil.rmtree(folders / "out")
    apply_to_model(folders / "source", other, folders / "out")
    refused(folders, OTHER_BYTES)
    shutil.rmtree(folders / "out")
    apply_to_model(folders / "source", plan_of((0, [6, 1]), (2, [2, 5, 7])), folders / "out")
    refused(folders, "the tensor model.layers.0.mlp.experts.2.down_proj.weight is missing|bytes, expected")


def test_only_copies_are_taken_back_from_the_pruned_folder(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blended(Copy):
        """Has the place of a copy and other bytes."""

    def blended(*arguments: Any) -> list[NewTensor]:
        first, *rest = kept_tensors(*arguments)
        piece = Blended(**dataclasses.asdict(first.pieces[0]))
        return [dataclasses.replace(first, pieces=(piece, *first.pieces[1:])), *rest]

    monkeypatch.setattr(undo_module, "kept_tensors", blended)
    refused(folders, OTHER_BYTES)


def test_rows_of_another_pruning_are_found_by_their_bytes(tmp_path: Path) -> None:
    saved("gpt_oss", tmp_path / "source")
    for name, order in (("first", [6, 1, 3]), ("second", [6, 1])):
        apply_to_model(tmp_path / "source", plan_of((0, order)), tmp_path / name, undo=tmp_path / f"undo {name}")
    with pytest.raises(SecateurError, match=r"first.*: .* has \d+ bytes, expected \d+"):
        restore(tmp_path / "first", tmp_path / "undo second", tmp_path / "again")


def test_a_file_changed_after_the_pruning_is_found(folders: Path) -> None:
    (folders / "out/more/vocabulary.txt").write_text("a\nc\n")
    refused(folders, r"out/more/vocabulary\.txt: SHA-256 .* by .*undo/undo\.json; it was changed after the pruning")


def edit(folders: Path, **changes: Any) -> None:
    record = json.loads((folders / "undo/undo.json").read_text())
    (folders / "undo/undo.json").write_text(json.dumps(sealed(record | changes)))


def as_version_1(folders: Path) -> None:
    """The undo folder as the first version wrote it: no digests of what the pruning replaced, and no seal."""
    path = folders / "undo/undo.json"
    record = json.loads(path.read_text())
    del record["seal"]
    path.write_text(json.dumps(record | {"version": 1, "replaced": list(record["replaced"])}))


def test_a_bit_of_a_kept_file_that_changed_is_found(folders: Path) -> None:
    for name in ("config.json", "README.md", INDEX):
        path = folders / "undo/files" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        refused(folders, rf"undo/files/{name}: SHA-256 .*, expected .* by .*undo/undo\.json; it was changed after")
        path.unlink()
        refused(folders, f"undo/files/{name}: not there, expected a file of the source")
        path.write_bytes(whole)
    (folders / "out/more/vocabulary.txt").unlink()
    refused(folders, r"out/more/vocabulary\.txt: not there")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"sha256": "', '"sha256": "0'),  # a digest
        ('"more/vocabulary.txt"', '"more/vocabulary.tyt"'),  # a name
        ('"mtp": null', '"mtp": "drop"'),  # what would restore the same bytes
    ],
)
def test_a_record_that_changed_is_found_by_its_own_digest(before: str, after: str, folders: Path) -> None:
    path = folders / "undo/undo.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    refused(folders, r"undo/undo\.json: 'seal' is '[0-9a-f]{64}', but the rest has the SHA-256 [0-9a-f]{64}; it was")
    path.write_text(json.dumps(json.loads(text)))  # white space is none of it
    restore(folders / "out", folders / "undo", folders / "again")


def test_an_undo_folder_of_the_first_version_is_read_and_what_it_cannot_check_is_said(folders: Path) -> None:
    named = restore(folders / "out", folders / "undo", folders / "again")
    assert named["unchecked"] == []
    as_version_1(folders)
    done = restore(folders / "out", folders / "undo", folders / "more")
    assert done["unchecked"] == ["config.json", INDEX, "README.md", "plan.json"]
    assert contents(folders / "more") == contents(folders / "again") == contents(folders / "source")
    done = CliRunner().invoke(app, ["apply", *map(str, (folders / "out", folders / "undo", "--out", folders / "last"))])
    assert (
        "not checked, as an earlier version wrote the undo folder without their digests: config.json, " in done.output
    )
    (folders / "out/more/vocabulary.txt").write_text("a\nc\n")
    for name in ("again", "last"):
        shutil.rmtree(folders / name)
    refused(folders, r"out/more/vocabulary\.txt: SHA-256 .*, expected .* by .*undo/undo\.json; it was changed after")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "'version' is 3, expected one of 1, 2"),
        ({"version": 1}, "version 1 lists names under 'replaced', later ones have a digest of each, and 'seal'"),
        ({"replaced": ["config.json"]}, "version 1 lists names"),
        ({"plan": {}}, "'format' is missing"),
        (
            {"plan": PLAN.to_json() | {"layers": {"0": {"experts_before": 8, "order": [0]}}}},
            "is missing|bytes, expected",
        ),
        ({"weights": []}, r"'weights' is \[\], expected an object"),
        ({"weights": {"a": {"bytes": "x", "sha256": ""}}}, r"'weights\.a\.bytes' is 'x', expected a whole number"),
        ({"weights": {"../a": {"bytes": 1, "sha256": ""}}}, "names the file '../a'"),
        ({"replaced": {"/etc/passwd": ""}}, "names the file '/etc/passwd'"),
        ({"dropped": ["../../x"]}, "names the file '../../x'"),
        ({"copied": {"..": ""}}, "names the file '..'"),
        ({"copied": [1]}, r"undo\.json: 'copied' is \[1\], expected an object"),
        ({"replaced": 3}, r"undo\.json: 'replaced' is 3, expected an object or a list"),
    ],
)
def test_a_record_with_a_fault_is_refused(changes: Any, message: str, folders: Path) -> None:
    edit(folders, **changes)
    refused(folders, message)


def test_a_damaged_undo_folder_is_refused(folders: Path) -> None:
    header = next((folders / "undo/headers").iterdir())
    whole = header.read_bytes()
    header.write_bytes(whole[:50])
    refused(folders, "not a whole safetensors file")
    header.unlink()
    refused(folders, f"{header.name}: cannot be read \\(No such file")
    header.write_bytes(whole)
    dropped = next((folders / "undo").glob("dropped*"))
    dropped.write_bytes(dropped.read_bytes()[:-1])
    refused(folders, "truncated")


def test_a_taken_or_mixed_target_is_refused(folders: Path) -> None:
    for out in (folders / "out", folders / "undo/x", folders):
        with pytest.raises(SecateurError, match="same or inside each other"):
            restore(folders / "out", folders / "undo", out)
    (folders / "source" / "more" / "mine.txt").touch()
    with pytest.raises(SecateurError, match="already and not an empty folder"):
        restore(folders / "out", folders / "undo", folders / "source")


def test_a_source_that_is_there_already_needs_no_more(folders: Path) -> None:
    """Of a process that was killed when it had written all; of another source, or a changed one, it is an error."""
    done = restore(folders / "out", folders / "undo", folders / "again")
    assert restore(folders / "out", folders / "undo", folders / "again") == done
    for name in ("config.json", "more/vocabulary.txt", next((folders / "again").glob("*.safetensors")).name):
        path = folders / "again" / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(SecateurError, match="already and not an empty folder"):
            restore(folders / "out", folders / "undo", folders / "again")
        path.write_bytes(before)


@pytest.mark.process
@pytest.mark.slow
def test_a_restoring_killed_anywhere_is_finished_by_the_same_command(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()

    def again() -> None:
        restore(folders / "out", folders / "undo", root / "again")

    changes = changes_of(root, again)
    for nth in {*range(1, changes, STRIDE), changes}:
        shutil.rmtree(root)
        root.mkdir()
        assert forked(again, CrashPoint(root, nth)) == -9
        again()
        assert [path.name for path in root.iterdir()] == ["again"]
        assert contents(root / "again") == contents(folders / "source")


@pytest.mark.process
@pytest.mark.slow
def test_applying_killed_anywhere_is_finished_by_the_same_command(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()

    def apply() -> None:
        apply_to_model(folders / "source", PLAN, root / "out", undo=root / "undo")

    changes = changes_of(root, apply)
    expected = contents(root)
    for nth in {*range(1, changes, STRIDE), *range(changes - 3, changes + 1)}:
        shutil.rmtree(root)
        root.mkdir()
        assert forked(apply, CrashPoint(root, nth)) == -9
        apply()
        assert contents(root) == expected, nth


# what is done to the source while it is copied
CHANGES: dict[str, Callable[[Path], None]] = {
    "config.json cut": lambda source: os.truncate(source / "config.json", 20),
    "a file of weights replaced": lambda source: os.replace(
        shutil.copy(first_of(source), source.parent / "copy"), first_of(source)
    ),
    "a file of weights written to": lambda source: os.utime(first_of(source), (1, 1)),
    "a file that is copied removed": lambda source: (source / "more/vocabulary.txt").unlink(),
    "the card changed": lambda source: (source / "README.md").write_text("# Thine\n"),
}


def first_of(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_changes_while_it_is_copied_gives_no_result(name: str, folders: Path) -> None:
    def change(done: int, total: int) -> None:
        if done == total:  # of the weights; the small files come after them
            CHANGES[name](folders / "source")

    before = sorted(path.name for path in folders.iterdir() if path.name != "copy")
    with pytest.raises((SecateurError, FileNotFoundError)) as caught:
        apply_to_model(folders / "source", PLAN, folders / "new", undo=folders / "new-undo", on_bytes=change)
    assert str(folders / "source") in str(caught.value)
    assert sorted(path.name for path in folders.iterdir()) == before


def test_an_undo_folder_that_changes_while_it_is_read_restores_nothing(folders: Path) -> None:
    def change(done: int, total: int) -> None:
        if done == total:
            os.utime(folders / "undo" / "files" / "config.json", (1, 1))

    with pytest.raises(SecateurError, match=r"config\.json: it was changed while it was in use"):
        restore(folders / "out", folders / "undo", folders / "again", on_bytes=change)
    assert not (folders / "again").exists()


@pytest.mark.parametrize("gone", ["folder", "file"])
def test_what_is_taken_away_while_it_is_written_gets_no_name(
    folders: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(source: Path, target: Path) -> None:
        if gone == "folder" and not any(folders.glob("seen")):
            (folders / "seen").touch()
            shutil.rmtree(target.parent)  # which the copy makes anew
        copy_file(source, target)
        for path in target.parent.glob("model-00001-*"):
            path.unlink()

    before = sorted(path.name for path in folders.iterdir())
    monkeypatch.setattr("secateur.model_folder.rewrite.undo.copy_file", take)
    with pytest.raises(SecateurError, match=r"partial: model-00001-\S+ was taken away while the folder was written"):
        restore(folders / "out", folders / "undo", folders / "again")
    assert sorted(path.name for path in folders.iterdir() if path.name != "seen") == before


def test_a_source_in_one_file_without_an_index_comes_back(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source", max_shard_size="1GB")
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out", undo=tmp_path / "undo")
    restore(tmp_path / "out", tmp_path / "undo", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "source")
    assert INDEX not in contents(tmp_path / "again")
