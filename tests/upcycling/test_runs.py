"""A run: all of it or nothing, on after a kill, nothing in a dry run, and what it leaves and says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import SecateurError
from secateur.model_folder.rewrite import computed
from secateur.model_folder.rewrite.pieces import Copy
from secateur.model_folder.rewrite.writer import Writer
from secateur.upcycling.upcycle import upcycle
from support.crash_points import CrashPoint, changes_of, forked
from support.dense_models import parents_in, texts_in
from support.grown import faults, logits, model_in, tensors
from support.long_tests import ARE_RUN
from support.model_folders import contents

STRIDE = 4 if ARE_RUN else 17  # between the moments of a kill


@pytest.mark.process
@pytest.mark.slow
def test_killed_anywhere_the_same_command_finishes_it(
    llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.upcycling.write.SHARD", 60_000)
    root = tmp_path / "root"
    root.mkdir()

    def grow() -> None:
        torch.set_num_threads(1)  # the threads of others are not in a fork
        upcycle(llamas, root / "out", granularity=2)

    changes = changes_of(root, grow)
    expected = contents(root)
    assert {name.split("/")[0] for name in expected} == {"out"}
    for nth in {*range(1, changes, STRIDE), *range(changes - 3, changes + 1)}:
        shutil.rmtree(root)
        root.mkdir()
        assert forked(grow, CrashPoint(root, nth)) == -9
        assert not (root / "out").exists() or contents(root / "out")
        assert forked(grow) == 0
        assert contents(root) == expected, nth


def interrupted(parents: list[Path], out: Path, stage: str, **options: Any) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == stage and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(parents, out, on_progress=stop, **options)


def test_what_was_looked_at_is_not_looked_at_again(llamas: list[Path], tmp_path: Path) -> None:
    data = {"router": "ridge", "router_data": [*texts_in(tmp_path), f"more={tmp_path / 'code.txt'}"], "samples": 2}
    options: dict[str, Any] = {**data, "sequence_length": 16}
    upcycle(llamas, tmp_path / "whole", **options)
    interrupted(llamas, tmp_path / "out", "writing", **options)
    stages: list[str] = []
    upcycle(llamas, tmp_path / "out", **options, on_progress=lambda what, done, total: stages.append(what))
    assert "looking at layers" not in stages
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_wish_needs_a_new_beginning(llamas: list[Path], tmp_path: Path) -> None:
    interrupted(llamas, tmp_path / "out", "writing")
    with pytest.raises(SecateurError, match=r"an unfinished start with another seed; .*--restart"):
        upcycle(llamas, tmp_path / "out", seed=1)
    with pytest.raises(SecateurError, match="an unfinished start with another parents"):
        upcycle(llamas[:2], tmp_path / "out")
    upcycle(llamas, tmp_path / "out", seed=1, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_is_there_is_left_alone(llamas: list[Path], tmp_path: Path) -> None:
    first = upcycle(llamas, tmp_path / "out")
    before = contents(tmp_path)
    again = upcycle(llamas, tmp_path / "out")
    assert again.to_json() == first.to_json() | {"is_there": True}
    with pytest.raises(SecateurError, match="not what this command would write: top_k was another"):
        upcycle(llamas, tmp_path / "out", top_k=1)
    assert contents(tmp_path) == before
    (tmp_path / "out/model.safetensors").write_bytes(before["out/model.safetensors"][:-4] + b"oops")
    with pytest.raises(SecateurError, match="not what this command would write: every"):
        upcycle(llamas, tmp_path / "out")


def test_a_dry_run_writes_nothing_and_says_the_same(llamas: list[Path], tmp_path: Path) -> None:
    dry = upcycle(llamas, tmp_path / "out", granularity=3, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert dry.to_json() == upcycle(llamas, tmp_path / "out", granularity=3).to_json()
    assert dry.num_bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())


def test_a_parent_that_changes_meanwhile_gives_no_result(llamas: list[Path], tmp_path: Path) -> None:
    parents = [Path(shutil.copytree(parent, tmp_path / parent.name)) for parent in llamas]

    def change(what: str, done: int, total: int) -> None:
        if done == total:
            os.utime(parents[1] / "model.safetensors", (1, 1))

    with pytest.raises(SecateurError, match=r"p1.model\.safetensors: .*chang"):
        upcycle(parents, tmp_path / "out", on_progress=change)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_under_the_name(
    llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.model_folder.rewrite.writer.os.write", full)
        with pytest.raises(OSError, match="No space left on device"):
            upcycle(llamas, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    upcycle(llamas, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_computes_in_small_pieces_and_never_reads_more_than_one_matrix(
    llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computed, "ENTRIES", 100)
    read: list[int] = []
    all_of = Writer._all_of

    def recorded(self: Writer, piece: Copy) -> bytes:
        read.append(piece.length)
        return all_of(self, piece)

    monkeypatch.setattr(Writer, "_all_of", recorded)
    split: dict[str, Any] = {"form": "split", "experts": 6, "top_k": 2, "division": "kmeans", "router": "random"}
    noisy: dict[str, Any] = {"form": "copy", "experts": 2, "noise": 0.1}
    largest = []
    for number, (parents, options) in enumerate(
        ((llamas, {"granularity": 2}), (llamas[:1], noisy), (llamas[:1], split))
    ):
        read.clear()
        upcycle(parents, tmp_path / f"out{number}", **options)
        largest.append(max(read))
    assert largest == [100 * 4, 3 * 32 * 4, 48 * 32 * 4]
    monkeypatch.undo()
    upcycle(llamas, tmp_path / "out", granularity=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "out0")
    upcycle(llamas[:1], tmp_path / "noisy", **noisy)
    assert contents(tmp_path / "noisy").keys() == contents(tmp_path / "out1").keys()


def test_the_record_names_every_tensor_and_every_file(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "out")
    record = json.loads((tmp_path / "out/upcycle.json").read_text())
    made = tensors(tmp_path / "out")
    assert sorted(record["tensors"]) == sorted(made)
    assert record["tensors"]["model.norm.weight"] == {
        "made": "averaged",
        "of": [f"{number}:model.norm.weight" for number in range(3)],
    }
    for parent, told in zip(llamas, record["parents"], strict=True):
        assert told["name"] == parent.name
        assert set(told["files"]) == {"config.json", "model.safetensors"}
        for name, digest in told["files"].items():
            assert hashlib.sha256((parent / name).read_bytes()).hexdigest() == digest
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "| 2 | p2 |" in card
    assert str(tmp_path) not in card


def test_the_report_compares_with_every_parent(llamas: list[Path], tmp_path: Path) -> None:
    (text := tmp_path / "text").write_text("it was the best of times " * 9)
    found = upcycle(llamas, tmp_path / "out", text=text).comparison
    assert found is not None
    from secateur.upcycling.compare import text_tokens

    tokens = text_tokens(text, llamas[0], 280)
    with torch.no_grad():
        ours, *theirs = (model_in(folder).float()(tokens) for folder in (tmp_path / "out", *llamas))
    for one, told in zip(theirs, found["parents"], strict=True):
        gap = (ours.logits - one.logits).abs()
        assert told["max_logit_difference"] == pytest.approx(float(gap.max()), rel=1e-3)
        assert told["mean_logit_difference"] == pytest.approx(float(gap.mean()), rel=1e-3)
        loss = torch.nn.functional.cross_entropy(one.logits[0, :-1], tokens[0, 1:])
        assert told["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    loss = torch.nn.functional.cross_entropy(ours.logits[0, :-1], tokens[0, 1:])
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found["tokens"] == tokens.shape[1]


def test_the_commands(llamas: list[Path], tmp_path: Path) -> None:
    out, names = str(tmp_path / "out"), [str(parent) for parent in llamas]
    run: Callable[..., Any] = CliRunner().invoke
    dry = run(app, ["upcycle", *names, "--out", out, "--dry-run"])
    assert dry.stdout.startswith(f"would write {out}\n3 experts of 48 neurons in 2 layers, top-2, as mixtral")
    assert run(app, ["upcycle", *names, "--out", out, "--quiet"]).stdout == ""
    assert run(app, ["upcycle", *names, "--out", out]).stdout.startswith(f"{out} is there already")
    shown = json.loads(run(app, ["upcycle", *names, "--out", out, "--json"]).stdout)
    assert (shown["form"], shown["experts"], shown["is_there"]) == ("btx", 3, True)
    verified = run(app, ["verify", *names, out])
    assert verified.exit_code == 0
    assert verified.stdout.count("passed: ") == len(verified.stdout.splitlines()) == 8
    wrong = run(app, ["verify", *reversed(names), out])
    assert wrong.exit_code == 1
    assert "FAILED: the parents are those" in wrong.stdout
    with pytest.raises(SecateurError, match="its tensors are compared and nothing is run"):
        secateur.verify(llamas, out, text=out)


def test_what_grew_is_a_model_like_any_other(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "out")
    assert secateur.inspect(tmp_path / "out").experts == {0: 3, 1: 3}
    secateur.prune(tmp_path / "out", tmp_path / "small", keep=2, criterion="weight_norm")
    assert logits(tmp_path / "small").isfinite().all()
    assert not (tmp_path / "small/upcycle.json").exists()  # of the weights of the source, and no others
    assert secateur.verify(tmp_path / "out", tmp_path / "small", tokens=4).passed
    options: dict[str, Any] = {"steps": 1, "sequence_length": 16, "batch_size": 1}
    (text := tmp_path / "text.txt").write_text("it was the best of times " * 99)
    secateur.finetune(tmp_path / "out", tmp_path / "tuned", data=text, **options)
    assert not (tmp_path / "tuned/upcycle.json").exists()


def test_parents_without_tokenizers(tmp_path: Path) -> None:
    parents = parents_in(tmp_path, count=2)
    for parent in parents:
        for file in parent.glob("token*"):
            file.unlink()
    assert upcycle(parents, tmp_path / "out").to_json()["tokenizers_compared"] is False
    assert not faults(parents, tmp_path / "out")
