"""Applying a plan to a model folder: what is written, what is refused, and what a failure leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError
from secateur.model_folder.read.tensor_files import read_tensor_files
from secateur.model_folder.rewrite import apply as apply_module
from secateur.model_folder.rewrite import writer as writer_module
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.model_folder.rewrite.card import card
from secateur.model_folder.rewrite.pieces import Copy, NewTensor
from secateur.model_folder.rewrite.writer import Shard, Writer, into_shards, write_shard
from secateur.plans import Plan
from support.model_folders import INDEX, contents, gathered, plan_of, same_bytes, saved, tensors_of, write
from support.small_runs import in_child

EXPERTS, ROUTERS = r".*layers\.(\d+)\..*experts\.", ("gate.weight",)
PLAN = plan_of((0, [6, 1, 3]), (1, [0, 1, 2]), (2, [2, 5, 7]))
DIFFERENT = plan_of((0, [6, 1, 3]), (2, [2, 5, 6, 7]))
CARD = "---\nlicense: apache-2.0\ntags: [moe]\n---\n# The original\n\nIts text.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe with everything that lies beside weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny-moe"
    saved("qwen3_moe", folder)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "notes/readme.txt", "modeling_custom.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the file {name}\n")
    (folder / "README.md").write_text(CARD)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["note"] = "kept"
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "tiny-moe"))


def refused(source: Path, plan: Plan, message: str, **options: Any) -> None:
    before = contents(source)
    with pytest.raises(SecateurError, match=message):
        apply_to_model(source, plan, source.parent / "out", **options)
    assert contents(source) == before
    assert sorted(path.name for path in source.parent.iterdir() if path != source) == []


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_every_kept_tensor_is_the_one_that_names_and_index_select_give(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    apply_to_model(source, PLAN, tmp_path / "out")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(tensors_of(source), PLAN, EXPERTS, ROUTERS))
    assert contents(source) == before


def test_the_files_are_as_large_as_the_sources_and_the_index_lists_them(source: Path, tmp_path: Path) -> None:
    apply_to_model(source, PLAN, tmp_path / "out")
    before, after = read_tensor_files(source), read_tensor_files(tmp_path / "out")
    largest = max(sum(t.length for t in before.tensors.values() if t.file == file) for file in before.headers)
    sizes = [sum(t.length for t in after.tensors.values() if t.file == file) for file in after.headers]
    assert 1 < len(sizes) < len(before.headers)
    assert max(sizes) <= largest
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(sizes), "note": "kept"}
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)
    ]
    assert all(header.metadata == {"format": "pt"} for header in after.headers.values())


def test_a_model_in_one_file_stays_in_one_file_without_an_index(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "source", max_shard_size="1GB")
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*model*")] == ["model.safetensors"]
    found = tensors_of(tmp_path / "out")
    assert same_bytes(found, gathered(tensors_of(tmp_path / "source"), PLAN, EXPERTS, ROUTERS))


def test_only_the_counts_that_were_there_change_in_config_json(source: Path, tmp_path: Path) -> None:
    config = config_in(source)
    both = config | {"num_experts": 8, "unknown": [1, {"a": None}]}
    (source / "config.json").write_text(json.dumps(both))
    apply_to_model(source, PLAN, tmp_path / "out")
    after = config_in(tmp_path / "out")
    assert after == both | {"num_experts": 3, "num_local_experts": 3}
    assert list(after) == list(both)


def test_all_files_beside_the_weights_are_carried_over_and_weights_in_other_forms_are_not(
    source: Path, tmp_path: Path
) -> None:
    report = apply_to_model(source, PLAN, tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    carried = {"generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_custom.py"}
    carried |= {"notes/readme.txt"}
    assert {name: after[name] for name in carried} == {name: before[name] for name in carried}
    new = {"config.json", INDEX, "README.md", "plan.json", "report.json", "report.html"}
    assert {name for name in after if not name.endswith(".safetensors")} == carried | new
    assert report["files_left_out"] == ["pytorch_model.bin"]
    assert json.loads(after["report.json"]) == report
    assert Plan.load(tmp_path / "out/plan.json") == PLAN
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert "<table>" in after["report.html"].decode()


def test_what_was_true_of_the_source_alone_is_not_carried_over(source: Path, tmp_path: Path) -> None:
    for name in ("finetune.json", "verify.json", "report.json", "report.html", "observed/stats.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("of the source\n")
    (source / "modeling_secateur.py").write_text("of the source\n")
    report = apply_to_model(source, PLAN, tmp_path / "out")
    assert not [name for name, content in contents(tmp_path / "out").items() if content == b"of the source\n"]
    new = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert new.isdisjoint({"finetune.json", "verify.json", "observed/stats.safetensors", "modeling_secateur.py"})
    assert set(report["files_copied"]) <= new - {"report.json", "report.html", "README.md", "plan.json"}


def test_the_card_keeps_the_head_on_top_and_the_original_below(source: Path, tmp_path: Path) -> None:
    apply_to_model(source, DIFFERENT, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\ntags: [moe]\n---\n\n# tiny-moe, pruned\n")
    assert "15 of 24 experts" in text
    assert "trust_remote_code=True" in text
    assert "vLLM" in text
    assert "| 0 | 8 | 3 |\n| 1 | 8 | 8 |\n| 2 | 8 | 4 |" in text
    assert text.endswith("# Original model card\n\n# The original\n\nIts text.\n")
    assert str(source) not in text


@pytest.mark.parametrize("original", [None, "", "---\nnever closed", "no head\n---\nx"])
def test_a_card_without_a_head_is_kept_whole(original: str | None, source: Path, tmp_path: Path) -> None:
    text = card(apply_to_model(source, PLAN, tmp_path / "out", dry_run=True), original, ("load it",))
    assert text.startswith("# tiny-moe, pruned\n")
    assert text.rstrip().endswith(original.rstrip() if original else "--out DIR`.")
    assert "loads wherever the original did" in text


def test_layers_that_differ_get_the_code_and_the_counts(source: Path, tmp_path: Path) -> None:
    config = config_in(source) | {"auto_map": {"AutoModelForCausalLM": "modeling_custom.Custom"}}
    (source / "config.json").write_text(json.dumps(config))
    apply_to_model(source, DIFFERENT, tmp_path / "out")
    after = config_in(tmp_path / "out")
    assert after["moe_config"] == {"per_layer_experts_blocks": [3, 8, 4]}
    assert after["num_local_experts"] == 8
    assert after["auto_map"]["AutoModelForCausalLM"] == "modeling_secateur.PrunedQwen3MoeForCausalLM"
    assert (tmp_path / "out/modeling_secateur.py").is_file()
    found = tensors_of(tmp_path / "out")
    assert same_bytes(found, gathered(tensors_of(source), DIFFERENT, EXPERTS, ROUTERS))


def test_a_pruned_folder_is_pruned_again_and_every_expert_still_knows_its_first_id(
    source: Path, tmp_path: Path
) -> None:
    from secateur.plans import LayerPlan

    apply_to_model(source, DIFFERENT, tmp_path / "first")
    sizes = {0: (3, (2, 0)), 1: (8, (7, 4)), 2: (4, (0, 3))}
    layers = {layer: LayerPlan(experts_before=n, order=order) for layer, (n, order) in sizes.items()}
    again = Plan(layers=layers, criterion="again")
    apply_to_model(tmp_path / "first", again, tmp_path / "second")
    whole = DIFFERENT.compose(again)
    assert Plan.load(tmp_path / "second/plan.json") == whole
    assert whole.layers[0].order == (3, 6)
    assert same_bytes(tensors_of(tmp_path / "second"), gathered(tensors_of(source), whole, EXPERTS, ROUTERS))
    config, first = config_in(tmp_path / "second"), config_in(source)
    assert config == first | {"num_local_experts": 2}
    assert not (tmp_path / "second/modeling_secateur.py").exists()


def test_a_dry_run_writes_nothing_and_says_the_same(source: Path, tmp_path: Path) -> None:
    dry = apply_to_model(source, PLAN, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert dry == apply_to_model(source, PLAN, tmp_path / "out")


def test_progress_ends_at_all_bytes(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = apply_to_model(source, PLAN, tmp_path / "out", on_bytes=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report["bytes_after"], report["bytes_after"])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of((3, [0, 1])), "layer 3 is not a MoE layer"),
        (plan_of((0, [0, 1]), experts=16), "is for 16 experts, the model has 8"),
        (plan_of((0, [5])), "layer 0 keeps 1 experts, its router needs 2"),
    ],
)
def test_a_plan_of_another_model_is_refused(plan: Plan, message: str, source: Path) -> None:
    refused(source, plan, message)


def test_groups_of_the_router_keep_the_same_number_each(tmp_path: Path) -> None:
    saved("deepseek_v3 grouped", tmp_path / "source")
    for order in ([0, 1, 2, 4, 5], [0, 1, 2, 4], [0, 4, 1, 5], [0, 1, 4]):
        with pytest.raises(SecateurError, match=r"router groups; each must keep the same|its router needs 4"):
            apply_to_model(tmp_path / "source", plan_of((1, order)), tmp_path / "out")


def test_expert_parallel_ranks_must_divide_every_count(source: Path, tmp_path: Path) -> None:
    refused(source, PLAN, "layer 0: 3 experts after the plan, expected a multiple of 2", expert_parallel=2)
    refused(source, plan_of((1, [0, 1, 2])), r"layer 1: 3 experts .* multiple of 4", expert_parallel=4)
    apply_to_model(source, PLAN, tmp_path / "out", expert_parallel=3)


def test_targets_that_are_taken_or_mix_with_the_source_are_refused(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    for out in (source, source / "out", source.parent):
        with pytest.raises(SecateurError, match="the same or inside each other"):
            apply_to_model(source, PLAN, out)
        with pytest.raises(SecateurError, match=r"--undo .* the same or inside each other"):
            apply_to_model(source, PLAN, tmp_path / "out", undo=out)
    with pytest.raises(SecateurError, match=r"--undo .* and --out .* are the same or inside each other"):
        apply_to_model(source, PLAN, tmp_path / "out", undo=tmp_path / "out/undo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").touch()
    with pytest.raises(SecateurError, match="it is there already and not an empty folder"):
        apply_to_model(source, PLAN, tmp_path / "out")
    with pytest.raises(SecateurError, match="not a folder"):
        apply_to_model(tmp_path / "nowhere", PLAN, tmp_path / "other")
    assert contents(source) == before


def test_a_source_that_is_damaged_is_refused(source: Path) -> None:
    path = next(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    refused(source, PLAN, "truncated or damaged")


def test_a_full_disk_leaves_nothing_and_another_try_succeeds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        apply_to_model(source, PLAN, tmp_path / "out", undo=tmp_path / "undo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-moe"]
    apply_to_model(source, PLAN, tmp_path / "out", undo=tmp_path / "undo")
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(tensors_of(source), PLAN, EXPERTS, ROUTERS))


def written_and_not_named(source: Path, out: Path) -> None:
    """Write a result, say that it is there, and never give it its name."""

    def wait(*_: object) -> None:
        out.with_name("written").write_text(str(os.getpid()))
        os.rename(out.with_name("written"), out.with_name("pid"))
        time.sleep(600)

    apply_module.verify_written = wait  # type: ignore[assignment]
    apply_to_model(source, PLAN, out)


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_leaves_no_output_and_the_next_one_clears_up_and_succeeds(source: Path, tmp_path: Path) -> None:
    statuses: list[int] = []
    child = lambda: statuses.append(in_child(written_and_not_named, source, tmp_path / "out"))  # noqa: E731
    other = threading.Thread(target=child, daemon=True)
    other.start()
    while not (tmp_path / "pid").exists():
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(SecateurError, match="plan: layer 9"):  # while it lives, its half is its own
        apply_to_model(source, plan_of((9, [0])), tmp_path / "out")
    whole = apply_to_model(source, PLAN, tmp_path / "other")
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    other.join()
    assert statuses == [-9]
    assert not (tmp_path / "out").exists()
    assert apply_to_model(source, PLAN, tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "pid", "tiny-moe"]


def test_two_runs_at_once_do_not_remove_each_others_half(tmp_path: Path) -> None:
    from secateur.files.new_folder import written_beside

    with written_beside(tmp_path / "out") as first:
        with written_beside(tmp_path / "out") as second:
            (second / "y").touch()
        assert first.is_dir()
        shutil.rmtree(tmp_path / "out")
        (first / "x").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("ending", ["experts.2.up_proj.weight", "gate.weight", "model.norm.weight"])
def test_what_was_written_wrongly_is_found_at_either_end_of_a_piece_before_it_gets_its_name(
    ending: str, at: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = apply_module.verify_written

    def flip(before: Any, written: Any, *rest: Any) -> None:
        name = next(name for name in written.files.tensors if name.endswith(ending))
        place = written.files.tensors[name]
        path = written.files.path / place.file
        data = bytearray(path.read_bytes())
        data[place.start + at % place.length] ^= 1
        path.write_bytes(data)
        real(before, written, *rest)

    monkeypatch.setattr(apply_module, "verify_written", flip)
    monkeypatch.setattr(apply_module, "ENDS", 8)
    refused(source, PLAN, f"verify: .*{ending} differs from .*{ending.split('.')[-2]}.weight of the source")


def test_bytes_are_copied_alike_where_the_system_cannot_copy_by_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_to_model(source, PLAN, tmp_path / "fast")

    def cannot(*_: object, **__: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", cannot, raising=False)
    seen: list[tuple[int, int]] = []
    apply_to_model(source, PLAN, tmp_path / "slow", on_bytes=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "slow") == contents(tmp_path / "fast")
    weights = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "slow").values())
    assert seen[-1] == (weights, weights)
    monkeypatch.delattr("os.copy_file_range")
    apply_to_model(source, PLAN, tmp_path / "without")
    assert contents(tmp_path / "without") == contents(tmp_path / "fast")


def test_other_errors_of_the_system_are_not_taken_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.copy_file_range", full)
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(OSError, match="No space"), Writer(tmp_path / "b", tmp_path.joinpath, lambda _: None) as writer:
        writer.append(Copy(file="a", start=0, length=3))


def test_a_source_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with (
        pytest.raises(SecateurError, match="a: it has become shorter while it was read"),
        Writer(tmp_path / "b", tmp_path.joinpath, lambda _: None) as writer,
    ):
        writer.append(Copy(file="a", start=1, length=3))


@dataclass(frozen=True)
class Sevens:
    """A kind of piece that Secateur does not have."""

    length: int


def test_a_piece_is_written_and_reported_by_the_rule_for_its_kind_and_without_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    pieces: Any = (Copy(file="a", start=1, length=2), Sevens(3), Copy(file="a", start=0, length=1))
    tensor = NewTensor(name="w", dtype="U8", shape=(6,), pieces=pieces)
    shard, seen = Shard(file="b", tensors=(tensor,)), list[int]()
    known = "Copy, Mean, Part, Beside"
    with pytest.raises(SecateurError, match=rf"first: a piece Sevens\(length=3\), expected one of {known}$"):
        write_shard(shard, tmp_path.joinpath, tmp_path / "first", {}, seen.append)
    seen.clear()

    def sevens(writer: Writer, piece: Sevens) -> None:
        writer.put(b"7" * piece.length, of_piece=True)

    monkeypatch.setattr(writer_module, "APPEND", {**writer_module.APPEND, Sevens: sevens})
    write_shard(shard, tmp_path.joinpath, tmp_path / "second", {}, seen.append)
    assert (tmp_path / "second").read_bytes().endswith(b"bc777a")
    assert (sum(seen), tensor.length) == (6, 6)


def made(name: str, length: int, dtype: str = "U8") -> NewTensor:
    return NewTensor(name=name, dtype=dtype, shape=(length,), pieces=(Copy(file="f", start=0, length=length),))


def test_tensors_fill_files_up_to_the_limit_and_wide_types_come_first() -> None:
    sizes = [4, 4, 3, 9, 1, 12]
    shards = into_shards([made(str(size), size) for size in sizes], 10)
    assert [[tensor.length for tensor in shard.tensors] for shard in shards] == [[4, 4], [3], [9, 1], [12]]
    assert shards[0].file == "model-00001-of-00004.safetensors"
    mixed = into_shards([made("a", 3), made("b", 8, "F64"), made("c", 2, "F16"), made("d", 1)], None)
    assert [tensor.name for tensor in mixed[0].tensors] == ["b", "c", "a", "d"]
    assert mixed[0].file == "model.safetensors"


def test_types_of_different_widths_stay_aligned(tmp_path: Path) -> None:
    from support.model_folders import config_of

    tensors = {
        **{f"model.layers.{n}.mlp.gate.weight": torch.rand(8, 3) for n in range(3)},
        **{f"model.layers.{n}.mlp.experts.{e}.{name}_proj.{end}": value
           for n in range(3) for e in range(8) for name in ("gate", "up", "down")
           for end, value in (("weight", torch.randint(0, 9, (3,), dtype=torch.uint8)), ("scale", torch.rand(1)))},
    }  # fmt: skip
    write(tmp_path / "source", config_of("qwen3_moe"), tensors)
    apply_to_model(tmp_path / "source", PLAN, tmp_path / "out")
    for tensor in read_tensor_files(tmp_path / "out").tensors.values():
        assert tensor.start % {"F32": 4, "U8": 1}[tensor.dtype] == 0
    assert same_bytes(tensors_of(tmp_path / "out"), gathered(tensors, PLAN, EXPERTS, ROUTERS))
