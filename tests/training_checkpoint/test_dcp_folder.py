"""The new folder is there whole or not at all, and the source is never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError
from secateur.plans import Plan
from secateur.surgery.config_json import with_counts
from secateur.training_checkpoint import apply
from secateur.training_checkpoint.apply import apply_to_checkpoint
from secateur.training_checkpoint.compare import verify_written
from secateur.training_checkpoint.stored import StoredCheckpoint
from support.dcp_checkpoints import PLAN, save, save_shards, tensors_of, trained, training_state
from support.faults import Kill, LimitFileSize
from support.small_runs import in_child
from support.tiny_models import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(training_state(*trained()), tmp_path_factory.mktemp("saved") / "source")


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint in a folder of its own, by hard links."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in saved.iterdir():
        os.link(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def saved_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shards(trained()[0], tmp_path_factory.mktemp("shards") / "source")


@pytest.fixture
def shards(saved_shards: Path, tmp_path: Path) -> Path:
    """A copy of it, as tests write into its files."""
    return Path(shutil.copytree(saved_shards, tmp_path / "source"))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(source: Path, out: Path, message: str, plan: Plan = PLAN) -> None:
    before = digests(source)
    beside = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(SecateurError, match=message):
        apply_to_checkpoint(source, plan, out)
    assert digests(source) == before
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == beside


def test_the_source_stays_and_the_result_carries_plan_and_report(source: Path, tmp_path: Path) -> None:
    before = digests(source)
    report = apply_to_checkpoint(source, PLAN, tmp_path / "new/out")
    assert digests(source) == before
    out = tmp_path / "new/out"
    assert Plan.load(out / "plan.json") == PLAN
    assert json.loads((out / "report.json").read_text()) == report
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    found = tensors_of(out)
    blobs = report["bytes_after"] - sum(t.nbytes for t in found.values())  # type: ignore[operator]
    assert report["bytes_before"] == sum(t.nbytes for t in tensors_of(source).values()) + blobs
    layers: Any = report["layers"]
    assert {layer: (one["experts_before"], one["experts_after"]) for layer, one in layers.items()} == {
        "0": (8, 3),
        "1": (8, 8),
        "2": (8, 5),
    }
    assert layers["0"]["dropped"] == [0, 2, 4, 5, 7]
    # router, gate_up and down: the parameter and two moments each
    assert [one["tensors_changed"] for one in layers.values()] == [9, 0, 9]


def test_a_dry_run_gives_the_report_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = apply_to_checkpoint(source, PLAN, tmp_path / "out", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert planned == apply_to_checkpoint(source, PLAN, tmp_path / "out")


def test_progress_ends_at_the_number_of_bytes_written(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = apply_to_checkpoint(
        source, PLAN, tmp_path / "out", on_bytes=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report["bytes_after"], report["bytes_after"])
    assert len(seen) > 10


def test_targets_that_are_not_free_are_refused(source: Path, tmp_path: Path) -> None:
    refused(source, source, "the same or inside each other")
    refused(source, source / "out", "the same or inside each other")
    refused(source, source.parent, "the same or inside each other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    refused(source, tmp_path / "full", "not an empty folder")
    refused(source, tmp_path / "full/file", "not an empty folder")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(source, tmp_path / "link", "not an empty folder")
    with pytest.raises(SecateurError, match="not a folder"):
        apply_to_checkpoint(tmp_path / "missing", PLAN, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    apply_to_checkpoint(source, PLAN, tmp_path / "empty")
    assert (tmp_path / "empty/.metadata").exists()


@pytest.mark.parametrize("format", ["dcp", "shards"])
def test_a_result_that_is_there_already_needs_no_more_and_another_one_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, format: str
) -> None:
    source: Path = request.getfixturevalue("source" if format == "dcp" else "shards")
    report = apply_to_checkpoint(source, PLAN, tmp_path / "out")
    before = digests(tmp_path / "out")
    assert apply_to_checkpoint(source, PLAN, tmp_path / "out") == report | {"is_there": True}
    assert digests(tmp_path / "out") == before
    refused(source, tmp_path / "out", "another plan or other options", Plan.identity({0: 8, 1: 8, 2: 8}))
    with pytest.raises(SecateurError, match=r"not an empty folder$"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out", dry_run=True)
    weights = next(name for name in before if name.endswith((".distcp", ".safetensors")))
    for name in (weights, "plan.json", "report.json"):  # report.json is not JSON then
        path = tmp_path / "out" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SecateurError):
            apply_to_checkpoint(source, PLAN, tmp_path / "out")
        path.write_bytes(content)
    (tmp_path / "out/more").touch()
    refused(source, tmp_path / "out", "its files are others")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_other_files_are_copied_and_what_a_plan_cannot_reach_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "rank").mkdir()
    (source / "rank/rng_state.pth").write_bytes(b"\0any")
    (source / "config.json").write_text('{"model": {"d_model": 4}}')
    (source / "again").symlink_to(source / "config.json")
    report = apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert (tmp_path / "out/rank/rng_state.pth").read_bytes() == b"\0any"
    assert (tmp_path / "out/config.json").read_text() == '{"model": {"d_model": 4}}'
    assert report["files_copied"] == ["again", "config.json", "rank/rng_state.pth"]
    assert report["configs_edited"] == []
    for name in ("model.safetensors", "rank/pytorch_model-1.bin", "__7_0.distcp", "optimizer.pt", "__0.metadata"):
        (source / name).touch()
        refused(source, tmp_path / "no", f"{name}: it holds weights or optimizer state")
        (source / name).unlink()
    for target in (tmp_path / "elsewhere", tmp_path):
        (tmp_path / "elsewhere").touch()
        (source / "link").symlink_to(target)
        refused(source, tmp_path / "no", "link: not a regular file of the folder")
        (source / "link").unlink()


def test_two_checkpoints_that_disagree_are_refused(source: Path, tmp_path: Path) -> None:
    other = {f"model.layers.{n}.mlp.{part}": torch.zeros(4, 2, 2) for n in (1, 2) for part in ("experts.down_proj",)}
    other |= {f"model.layers.{n}.mlp.gate.weight": torch.zeros(4, 2) for n in (1, 2)}
    save(other, source / "second")
    plan = Plan(layers={2: PLAN.layers[2]}, criterion="test")
    refused(source, tmp_path / "out", "layer 2 is for 8 experts, the checkpoint has 4", plan)
    other = {name.replace("layers.2", "layers.0"): value for name, value in other.items()}
    (source / "second/.metadata").unlink()
    (source / "second/__0_0.distcp").unlink()
    eight = {f"model.layers.2.mlp.{n}": torch.zeros(8, 2) for n in ("gate.weight", "experts.down_proj")}
    save(other | eight, source / "second")
    refused(source, tmp_path / "out", "layer 0: 4 experts in second, 8 elsewhere", plan)


def test_a_folder_without_experts_is_refused(tmp_path: Path) -> None:
    source = save({"model.layers.0.mlp.up_proj.weight": torch.zeros(3)}, tmp_path / "source")
    refused(source, tmp_path / "out", "no checkpoint with experts")


def child(source: Path, out: Path, fault: Callable[[], None], said: Path) -> int:
    """Apply the plan in a process that something happens to."""
    return in_child(apply_after, fault, source, out, stderr=said)


def apply_after(fault: Callable[[], None], source: Path, out: Path) -> None:
    fault()
    apply.apply_to_checkpoint(source, PLAN, out)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("format", ["dcp", "shards"])
def test_a_full_disk_leaves_nothing_and_says_so(request: pytest.FixtureRequest, tmp_path: Path, format: str) -> None:
    source: Path = request.getfixturevalue("source" if format == "dcp" else "shards")
    before = digests(source)
    full = LimitFileSize("secateur.training_checkpoint.apply:apply_to_checkpoint", 1, 50_000)
    assert child(source, tmp_path / "out", full, tmp_path / "said") == 1
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last.startswith("OSError")
    assert "File too large" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "source"]
    assert digests(source) == before


@pytest.mark.process
@pytest.mark.slow
def test_kill_9_leaves_no_folder_of_the_target_name_and_a_second_try_works(source: Path, tmp_path: Path) -> None:
    before = digests(source)
    kill = Kill("secateur.training_checkpoint.apply:verify_written")
    assert child(source, tmp_path / "out", kill, tmp_path / "said") == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert digests(source) == before
    apply_to_checkpoint(source, PLAN, tmp_path / "out")


def test_an_error_of_the_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("ending", ["param_groups.lm_head.weight.lr", "lm_head.weight", "2.mlp.experts.down_proj"])
def test_a_bit_that_the_disk_changes_is_found_before_the_folder_gets_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    real = apply.verify_written

    def flip(stored: Any, written: Any, changes: Any) -> None:
        places = written.blobs | {name: tensor.chunks[0].place for name, tensor in written.tensors.items()}
        place = next(place for name, place in places.items() if name.endswith(ending))
        data = bytearray(place.path.read_bytes())
        data[place.start + place.length // 2] ^= 1
        place.path.write_bytes(data)
        real(stored, written, changes)

    monkeypatch.setattr(apply, "verify_written", flip)
    refused(source, tmp_path / "out", f"verify: .*{ending} differs from the source")


def test_a_name_that_no_rule_covers_is_refused_by_the_file_that_it_is_in(source: Path, tmp_path: Path) -> None:
    path = source / ".metadata"
    damaged = path.read_bytes().replace(
        b"1.mlp.experts.down_proj.weight_decay", b"1.mlp.expErts.down_proj.weight_decay"
    )
    path.unlink()  # it is a link
    path.write_bytes(damaged)
    refused(source, tmp_path / "out", r"source/\.metadata: .*1\.mlp\.expErts\.down_proj\.weight_decay: no rule of the")


def test_shards_with_a_fault_are_refused(shards: Path, tmp_path: Path) -> None:
    path = next(shards.glob("*.safetensors"))
    data = path.read_bytes()
    for broken, message in (
        (data[:-100], "truncated or damaged"),
        (data[:5], "ends after 5 of 8 bytes"),
        (data[:1000], "of its header"),
        (b"\xff" * 8 + data[8:], "expected at most"),
        (data[:8] + b"[" + data[9:], "not a whole safetensors file"),
        (data.replace(b'"shape":[64,32]', b'"shape":[64,31]'), "8192 bytes for shape"),
        (data.replace(b"DCP_SHARDING_INFO", b"DCP_SHARDING_INFa"), "DCP_SHARDING_INFO"),
    ):
        path.write_bytes(broken)
        refused(shards, tmp_path / "out", message)
    path.write_bytes(data)
    path.rename(path.with_name(path.name.replace("shard-00001", "shard-00002")))
    refused(shards, tmp_path / "out", r"shards of ranks \[2\], expected all from 1 on")


def test_blocks_that_are_not_the_whole_tensor_are_refused(shards: Path, tmp_path: Path) -> None:
    path = next(shards.glob("*.safetensors"))
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.down_proj"
    offsets = {key: {"saved_offsets": [0] * value.dim()} for key, value in tensors.items()}
    offsets[name]["saved_offsets"][0] = 2
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    refused(
        shards,
        tmp_path / "out",
        rf"source/shard-00001-.*\.safetensors: {name}: 1 chunks hold .* entries, expected each of its",
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_local_experts": 6}, "num_local_experts is 6, but the checkpoint holds 8"),
        ({"architectures": None}, "need one architecture of transformers' own"),
        ({"architectures": ["../etc/passwd"]}, r"source: config\.json: architectures is .*, which is no model class"),
        ({"architectures": ["AutoConfig"]}, "which is no model class of transformers"),
        ({"architectures": [7]}, "which is no model class of transformers"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "auto_map"),
        ({"model_type": "unheard_of"}, "none of this transformers release"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, expected 3 to 1000000, as layer 2 has experts"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 3 to 1000000"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(shards: Path, tmp_path: Path, edit: Any, message: str) -> None:
    config = json.loads((shards / "config.json").read_text()) | edit
    (shards / "config.json").write_text(json.dumps(config))
    refused(shards, tmp_path / "out", message)
    (shards / "config.json").write_text("{")
    refused(shards, tmp_path / "out", "config.json: not JSON")


def test_a_config_in_a_folder_of_its_own_is_edited_there(source: Path, tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(source / "hf")
    report = apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert report["configs_edited"] == ["hf/config.json"]
    found = json.loads((tmp_path / "out/hf/config.json").read_text())
    assert found["moe_config"] == {"per_layer_experts_blocks": [3, 8, 5]}
    assert found["architectures"] == ["PrunedQwen3MoeForCausalLM"]
    assert found["auto_map"]["AutoConfig"] == "modeling_secateur.PrunedQwen3MoeConfig"
    assert (tmp_path / "out/hf/modeling_secateur.py").is_file()


def test_every_alias_of_the_count_changes_and_nothing_else() -> None:
    config = {
        "model_type": "x",
        "num_experts": 8,
        "num_experts_per_tok": 8,
        "text_config": {"num_experts": 8, "num_hidden_layers": 8},
        "ffn_config": {"moe_num_experts": 8},
    }
    found = with_counts(config, {0: 8, 3: 8}, {0: 4, 3: 4})
    assert found == config | {
        "num_experts": 4,
        "text_config": {"num_experts": 4, "num_hidden_layers": 8},
        "ffn_config": {"moe_num_experts": 4},
    }
    assert config["num_experts"] == 8


def test_entries_at_other_places_of_the_state_dict_are_not_the_same_checkpoint() -> None:
    empty = StoredCheckpoint(tensors={}, paths={"w": ("model", "w")}, files=frozenset())
    verify_written(empty, empty, {})
    with pytest.raises(SecateurError, match="verify: the entries are at other places of the state dict"):
        verify_written(empty, replace(empty, paths={"w": ("w",)}), {})
