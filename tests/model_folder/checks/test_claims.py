"""Every claim of `verify` falls where it must, by its own words, and no other one falls with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.model_folder.checks import computes
from secateur.model_folder.checks.claims import as_json, read_verified, verify_model
from secateur.model_folder.read import load as load_module
from secateur.model_folder.read.tensor_files import read_tensor_files
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.plans import Plan
from support.claims import detail, fallen, not_checked
from support.model_folders import INDEX, plan_of, saved

PLAN = plan_of((0, [1, 3, 6]), (1, [0, 4, 5]), (2, [2, 5, 7]))
SIDE = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"size": 8}',
    "finetune.json": '{"about": "these weights"}',
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    saved("qwen3_moe", root / "source")
    for name, text in SIDE.items():
        (root / "source" / name).write_text(text)
    apply_to_model(root / "source", PLAN, root / "out")
    return root


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file by a function that changes what it holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sets(key: str, value: object) -> Callable[[Any], object]:
    return lambda content: content.update({key: value})


def in_metadata(key: str, value: object) -> Callable[[Any], object]:
    return lambda content: content["metadata"].update({key: value})


def of_another_pruning(out: Path) -> None:
    other = plan_of((0, [0, 3, 6]), (1, [0, 4, 5]), (2, [2, 5, 7]))
    (out / "plan.json").unlink()
    other.save(out / "plan.json")


def second_set(out: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4)}, out / "consolidated.safetensors")
    (out / "consolidated.safetensors.index.json").write_text('{"weight_map": {}}')


def other_header(out: Path) -> None:
    """A file whose header says more than that of the source's files."""
    path = sorted(out.glob("*.safetensors"))[0]
    save_file(load_file(path), path, metadata={"format": "pt", "trained": "again"})


# what is done to the result -> the claim that falls, and how it says what was found
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "end of text": (
        lambda out: edit(out / "config.json", sets("eos_token_id", 7)),
        "config",
        "eos_token_id is 7, expected",
    ),
    "longest text": (
        lambda out: edit(out / "config.json", sets("max_position_embeddings", 8)),
        "config",
        "max_position_embeddings is 8, expected",
    ),
    "own code": (
        lambda out: edit(out / "config.json", sets("auto_map", {"AutoConfig": "evil.Config"})),
        "config",
        "auto_map is unexpected",
    ),
    "dropout": (
        lambda out: edit(out / "config.json", sets("attention_dropout", 0.5)),
        "config",
        "attention_dropout is 0.5, expected 0.0",
    ),
    "a key is gone": (
        lambda out: edit(out / "config.json", lambda config: config.pop("router_aux_loss_coef")),
        "config",
        "router_aux_loss_coef is missing",
    ),
    "other tokenizer": (
        lambda out: (out / "tokenizer.json").write_text('{"version": "2.0"}'),
        "side files",
        "tokenizer.json differs from the source's",
    ),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "side files", "tokenizer.json is missing"),
    "other template": (
        lambda out: (out / "chat_template.jinja").write_text(""),
        "side files",
        "chat_template.jinja differs from the source's",
    ),
    "no settings": (
        lambda out: (out / "generation_config.json").unlink(),
        "side files",
        "generation_config.json is missing",
    ),
    "other settings": (
        lambda out: edit(out / "generation_config.json", sets("do_sample", True)),
        "side files",
        "generation_config.json differs",
    ),
    "no preprocessor": (
        lambda out: (out / "preprocessor_config.json").unlink(),
        "side files",
        "preprocessor_config.json is missing",
    ),
    "size in the index": (
        lambda out: edit(out / INDEX, in_metadata("total_size", 1)),
        "index",
        f"{INDEX}: metadata.total_size is 1, expected",
    ),
    "more in the index": (
        lambda out: edit(out / INDEX, in_metadata("total_parameters", 1)),
        "index",
        f"{INDEX}: metadata.total_parameters is unexpected",
    ),
    "more in a header": (other_header, "index", "safetensors: trained is unexpected"),
    "plan of another pruning": (of_another_pruning, "records", "plan.json: layers.0.order is [0, 3, 6], expected"),
    "no plan": (lambda out: (out / "plan.json").unlink(), "records", "plan.json"),
    "bytes in the report": (
        lambda out: edit(out / "report.json", sets("bytes_after", 1)),
        "records",
        "report.json: bytes_after is 1, expected",
    ),
    "pickled weights": (
        lambda out: (out / "pytorch_model.bin").write_bytes(b"\x80"),
        "no strays",
        "pytorch_model.bin is neither",
    ),
    "a second set": (second_set, "no strays", "consolidated.safetensors is neither"),
    "a note": (lambda out: (out / "notes.txt").write_text("mine"), "no strays", "notes.txt is neither"),
    "what is of the source": (
        lambda out: (out / "finetune.json").write_text(SIDE["finetune.json"]),
        "no strays",
        "finetune.json is neither",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_fails_by_its_claim_and_no_other(name: str, folders: Path) -> None:
    damage, claim, words = DAMAGE[name]
    damage(folders / "out")
    checks = verify_model(folders / "source", folders / "out", num_tokens=0)
    assert fallen(checks) == {claim}
    assert words in detail(checks, claim)


def test_the_undamaged_folder_passes_and_a_card_may_be_edited(folders: Path) -> None:
    (folders / "out/README.md").write_text("Our own words.")
    checks = verify_model(folders / "source", folders / "out")
    assert (fallen(checks), not_checked(checks)) == (set(), set())


# Settings of a source that its own class cannot generate with greedily, or that give back something else.
UNABLE: dict[str, dict[str, Any]] = {
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "a dict": {"return_dict_in_generate": True, "output_scores": True},
    "forced tokens": {"forced_bos_token_id": 3, "forced_eos_token_id": 5},
    "no room": {"max_length": 4, "max_new_tokens": None},
}


@pytest.mark.parametrize("name", UNABLE)
def test_a_right_result_passes_whatever_its_settings_for_generation_say(name: str, folders: Path) -> None:
    for folder in ("source", "out"):
        (folders / folder / "generation_config.json").write_text(json.dumps(UNABLE[name]))
    checks = verify_model(folders / "source", folders / "out", num_tokens=8)
    assert (fallen(checks), not_checked(checks)) == (set(), set()), checks


def test_a_model_that_cannot_generate_fails_by_that_claim_and_still_loads(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: object, tokens: object) -> None:
        raise ValueError("no mouth")

    monkeypatch.setattr(computes, "generated", fails)
    checks = verify_model(made / "source", made / "out", num_tokens=8)
    assert fallen(checks) == {"speaks"}
    assert detail(checks, "speaks") == "ValueError: no mouth"


# --- models larger than memory ------------------------------------------------------------------------------------


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "free_memory", lambda: 1)

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded as a whole")

    monkeypatch.setattr(computes, "load", loads)


def change(folder: Path, name: str) -> None:
    """The last bit of one number of a tensor, in its file."""
    stored = read_tensor_files(folder).tensors[name]
    with (folder / stored.file).open("r+b") as file:
        file.seek(stored.start)
        byte = file.read(1)
        file.seek(stored.start)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.usefixtures("no_memory")
def test_a_model_larger_than_memory_is_proved_layer_by_layer(made: Path) -> None:
    checks = verify_model(made / "source", made / "out")
    assert (fallen(checks), not_checked(checks)) == (set(), {"speaks"})
    assert detail(checks, "logits") == "32 tokens, bit for bit, one layer in memory at a time"
    assert "are free" in detail(checks, "speaks")


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_in_which_two_models_part_is_named(layer: int, folders: Path) -> None:
    change(folders / "out", f"model.layers.{layer}.self_attn.q_proj.weight")
    checks = verify_model(folders / "source", folders / "out")
    assert fallen(checks) == {"tensors", "logits"}
    assert detail(checks, "logits").endswith(f", first in layer {layer}")


def test_the_layer_is_named_too_where_the_result_was_loaded_as_a_whole(folders: Path) -> None:
    change(folders / "out", "model.layers.1.self_attn.q_proj.weight")
    checks = verify_model(folders / "source", folders / "out")
    assert fallen(checks) == {"tensors", "logits"}
    assert detail(checks, "logits").endswith(", first in layer 1")


@pytest.mark.usefixtures("no_memory")
def test_a_plan_that_is_not_of_these_bytes_is_seen_layer_by_layer(folders: Path) -> None:
    """Other experts than the report says, everything else in order: the proof does not lean on the bytes."""
    edit(folders / "out/report.json", lambda report: report["plan"]["layers"]["1"].update(order=[0, 4, 6]))
    Plan.from_json(json.loads((folders / "out/report.json").read_text())["plan"]).save(folders / "out/plan.json")
    checks = verify_model(folders / "source", folders / "out")
    assert {"tensors", "logits"} <= fallen(checks)
    assert detail(checks, "logits").endswith(", first in layer 1")


def test_the_first_version_of_the_result_file_is_read(made: Path, tmp_path: Path) -> None:
    """As 0.1 wrote it: five claims, other words."""
    old = {
        "format": "secateur-verify",
        "version": 1,
        "source": "a",
        "pruned": "b",
        "passed": True,
        "checks": [{"claim": "it generates", "passed": None, "detail": "--tokens 0"}],
    }
    (tmp_path / "verify.json").write_text(json.dumps(old))
    assert read_verified(tmp_path / "verify.json") == old
    new = as_json(made / "source", made / "out", verify_model(made / "source", made / "out", num_tokens=0))
    (tmp_path / "verify.json").write_text(json.dumps(new))
    assert read_verified(tmp_path / "verify.json") == new


def test_a_name_that_the_class_leaves_unread_of_the_source_may_stay_in_the_result(folders: Path) -> None:
    extra = {"model.extra.weight": torch.ones(4)}
    for folder in ("source", "out"):
        save_file(extra, folders / folder / "model-extra.safetensors", metadata={"format": "pt"})
        edit(
            folders / folder / INDEX,
            lambda index: index["weight_map"].update({"model.extra.weight": "model-extra.safetensors"}),
        )
    checks = verify_model(folders / "source", folders / "out", num_tokens=0)
    assert "loads" not in fallen(checks)
    assert detail(checks, "loads") == "Qwen3MoeForCausalLM; it leaves 1 names unread, as it does of the source"
