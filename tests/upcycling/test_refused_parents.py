"""What cannot be grown is refused: the thing is named, nothing is written, the parents are as they were."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import SecateurError
from secateur.upcycling.checks import check_upcycled
from secateur.upcycling.upcycle import upcycle
from support.dense_models import parents_in
from support.grown import faults
from support.model_folders import contents
from support.tiny_models import tiny_model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def pair(llamas: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of two parents that a test may damage."""
    return [Path(shutil.copytree(parent, tmp_path / parent.name)) for parent in llamas[:2]]


OPTIONS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one parent": (1, {}, r"--form btx: found 1 parent\(s\), expected at least 2; for one model there are"),
    "two to copy": (2, {"form": "copy", "experts": 2}, r"--form copy: found 2 parent\(s\), expected 1"),
    "two to split": (2, {"form": "split", "experts": 2, "top_k": 1}, r"--form split: found 2 parent"),
    "form": (2, {"form": "mix"}, "--form mix: expected btx, .*copy, split"),
    "no count": (1, {"form": "copy"}, "--experts: --form copy needs a number"),
    "no top-k": (1, {"form": "split", "experts": 4}, "--top-k: --form split needs a number"),
    "does not divide": (1, {"form": "split", "experts": 5, "top_k": 1}, "--experts 5: does not divide the 48 neurons"),
    "granularity": (2, {"granularity": 5}, "--granularity 5: does not divide the 48 neurons"),
    "shared": (
        1,
        {"form": "split", "experts": 5, "top_k": 1, "shared_neurons": 16},
        r"--experts 5: does not divide the 32 neurons of an FFN \(48 without the 16 shared ones\)",
    ),
    "too narrow": (1, {"form": "split", "experts": 8, "top_k": 1}, "experts of 6 neurons: .* multiple of 4 in F32"),
    "top-k": (2, {"top_k": 3}, "--top-k 3: only 2 experts a layer"),
    "part of an FFN": (2, {"top_k": 3, "granularity": 2}, "--top-k 3: not a multiple of --granularity 2"),
    "attention from": (2, {"attention_from": 2}, "--attention-from 2: expected 0 to 1"),
    "noise": (2, {"noise": 0.1}, "--noise: --form btx does not take it"),
    "experts": (2, {"experts": 4}, "--experts: --form btx does not take it"),
    "renormalise": (
        1,
        {"form": "copy", "experts": 2, "renormalise": False},
        "--no-renormalise: a mixtral model always divides",
    ),
    "target": (2, {"target": "qwen3_moe"}, "--target qwen3_moe: llama parents do not become that, expected mixtral"),
    "router": (2, {"router": "norm"}, "--router norm: --form btx takes random, hidden, ridge"),
    "no data": (2, {"router": "hidden"}, "--router-data: found 0, expected one for each of the 2 parents"),
    "idle data": (2, {"router_data": ["a=b"]}, "--router-data: --router random reads no text"),
    "division": (1, {"form": "split", "experts": 4, "top_k": 1, "division": "x"}, "--division x: expected order"),
    "not a number": (2, {"router_std": float("nan")}, "--router-std nan: expected a number of at least 0"),
    "negative": (2, {"granularity": 0}, "--granularity 0: expected at least 1"),
    "another type": (2, {"top_k": "2"}, "--top-k: found '2', expected a whole number"),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_options_that_do_not_fit(case: str, dry_run: bool, llamas: list[Path], tmp_path: Path) -> None:
    count, options, message = OPTIONS[case]
    with pytest.raises(SecateurError, match=message):
        upcycle(llamas[:count], tmp_path / "out", dry_run=dry_run, **options)
    assert not list(tmp_path.iterdir())


def another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocab = found["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(found))


def far_away(folder: Path) -> None:
    torch.manual_seed(5)
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(folder, lambda found: found.update({name: torch.randn_like(found[name]) * 0.2}))


def renamed(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


PARENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "width": (lambda folder: edit_config(folder, intermediate_size=64), "mlp.gate_proj.weight is of shape"),
    "heads": (lambda folder: edit_config(folder, num_attention_heads=8), "num_attention_heads is 8, but 4 in"),
    "rope": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "rope_parameters is .*10000",
    ),
    "vocabulary": (
        lambda folder: edit_tensors(folder, lambda found: found.update({"lm_head.weight": torch.zeros(281, 32)})),
        r"p1: lm_head.weight has shape \(281, 32\), but \(280, 32\) in",
    ),
    "tied": (
        lambda folder: edit_tensors(folder, lambda found: found.pop("lm_head.weight")),
        "lm_head.weight is missing, which is in .*; tied and untied embeddings cannot be mixed",
    ),
    "type": (
        lambda folder: edit_tensors(
            folder, lambda found: found.update({"model.norm.weight": found["model.norm.weight"].half()})
        ),
        "model.norm.weight has dtype F16, but F32 in",
    ),
    "tokenizer": (another_tokenizer, "p1/tokenizer.json: another tokenizer than"),
    "no child": (far_away, r"model.layers.1.self_attn.k_proj.weight: its weights in two parents have a cosine of"),
    "not finite": (
        lambda folder: edit_tensors(folder, lambda found: found["lm_head.weight"].fill_(float("nan"))),
        "lm_head.weight holds values that are not finite",
    ),
    "a bias": (lambda folder: edit_tensors(folder, renamed), "q_proj.bias is missing, which is in"),
    "layers": (
        lambda folder: edit_config(folder, num_hidden_layers=3),
        "model.layers.2.mlp.gate_proj.weight is missing",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"}),
        "p1: it is quantised .*expected plain weights",
    ),
    "another family": (
        lambda folder: edit_config(folder, model_type="bloom"),
        "'bloom': nothing is known that its layers could",
    ),
    "whole numbers": (
        lambda folder: edit_tensors(
            folder, lambda found: found.update({"lm_head.weight": found["lm_head.weight"].to(torch.int8)})
        ),
        "lm_head.weight has type I8, expected one of",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", PARENTS)
def test_parents_that_do_not_fit_each_other(case: str, pair: list[Path], tmp_path: Path) -> None:
    spoil, message = PARENTS[case]
    spoil(pair[1])
    before = contents(tmp_path)
    with pytest.raises(SecateurError, match=message):
        upcycle(pair, tmp_path / "out")
    assert contents(tmp_path) == before


def test_biases_that_the_target_has_no_place_for(tmp_path: Path) -> None:
    parents = parents_in(tmp_path, count=2, attention_bias=True)
    with pytest.raises(SecateurError, match=r"a mixtral model has no place for model\.layers\.0\.self_attn\..*bias"):
        upcycle(parents, tmp_path / "out")


def test_a_package_that_is_not_installed(llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    asked: dict[str, Any] = {"form": "split", "experts": 6, "top_k": 2, "division": "kmeans", "router": "random"}
    with pytest.raises(
        SecateurError, match=r'need the package k-means-constrained: pip install "secateur\[upcycling\]"'
    ):
        upcycle(llamas[:1], tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_no_parent(llamas: list[Path], tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(SecateurError, match=r"moe: a mixture already \(num_local_experts\), expected a dense model"):
        upcycle([llamas[0], tmp_path / "moe"], tmp_path / "out")


def test_parents_that_are_no_children_are_averaged_where_that_is_asked_for(pair: list[Path], tmp_path: Path) -> None:
    far_away(pair[1])
    result = upcycle(pair, tmp_path / "out", allow_unrelated=True).to_json()
    assert result["least_cosine"]["tensor"] == "model.layers.1.self_attn.k_proj.weight"
    assert abs(result["least_cosine"]["cosine"]) < 0.3
    assert not faults(pair, tmp_path / "out")


def test_one_parent_twice(llamas: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="a parent is listed twice; for several copies"):
        upcycle([llamas[0], llamas[0]], tmp_path / "out")


def test_a_folder_that_is_not_free(llamas: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(SecateurError, match=r"--out .*out: it is there already and not an empty folder"):
        upcycle(llamas, tmp_path / "out")
    with pytest.raises(SecateurError, match="the same or inside each other"):
        upcycle(llamas, llamas[0] / "out")
    assert contents(tmp_path) == {"out/mine": b"x"}


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "an expert": (
        lambda found: found["model.layers.0.block_sparse_moe.experts.1.w1.weight"].view(-1)[5:6].add_(1e-6),
        "every expert and every copied tensor",
    ),
    "an average": (lambda found: found["model.norm.weight"][3:4].mul_(1 + 3e-7), "every averaged tensor"),
    "a router": (lambda found: found["model.layers.1.block_sparse_moe.gate.weight"].zero_(), "the routers are there"),
    "a tensor more": (lambda found: found.update(more=torch.zeros(1)), "the folder has these tensors"),
    "a router less": (lambda found: found.pop("model.layers.1.block_sparse_moe.gate.weight"), "the folder has these"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_what_was_changed(case: str, llamas: list[Path], tmp_path: Path) -> None:
    change, claim = DAMAGES[case]
    upcycle(llamas, tmp_path / "out")
    edit_tensors(tmp_path / "out", change)
    (found,) = faults(llamas, tmp_path / "out")
    assert found.startswith(claim)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of": (lambda found: found["tensors"]["model.norm.weight"].update(of=["0:model.norm.weight"]), "upcycle.json says"),
    "made": (lambda found: found["tensors"]["model.norm.weight"].update(made="copied"), "upcycle.json says of every"),
    "a tensor less": (lambda found: found["tensors"].pop("model.norm.weight"), "upcycle.json says of every tensor"),
    "a tensor more": (
        lambda found: found["tensors"].update(more=found["tensors"]["model.norm.weight"]),
        "upcycle.json says of every tensor",
    ),
    "digest of a parent": (
        lambda found: found["parents"][1]["files"].update({"model.safetensors": "ab"}),
        "the parents are those of upcycle.json",
    ),
    "digest of a router": (
        lambda found: found["routers"].update({"model.layers.0.block_sparse_moe.gate.weight": "ab"}),
        "the routers are there, as upcycle.json has them",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_verify_finds_what_is_wrong_in_the_record(case: str, llamas: list[Path], tmp_path: Path) -> None:
    change, claim = RECORDS[case]
    upcycle(llamas, tmp_path / "out")
    path = tmp_path / "out/upcycle.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (found,) = faults(llamas, tmp_path / "out")
    assert found.startswith(claim)


def test_a_division_that_is_none(llamas: list[Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"form": "split", "experts": 6, "top_k": 2, "division": "kmeans", "router": "random"}
    upcycle(llamas[:1], tmp_path / "out", **asked)
    path = tmp_path / "out/upcycle.json"
    whole = json.loads(path.read_text())
    for wrong in ([0] * 48, list(range(47)), list(range(1, 49))):
        path.write_text(json.dumps(whole | {"division": whole["division"] | {"1": wrong}}))
        with pytest.raises(SecateurError, match=r"'division.1' is no order of 48 neurons"):
            check_upcycled(llamas[:1], tmp_path / "out")
    swapped = whole["division"]["1"][::-1]
    path.write_text(json.dumps(whole | {"division": whole["division"] | {"1": swapped}}))
    assert [one[:12] for one in faults(llamas[:1], tmp_path / "out")] == ["every expert"]
    path.write_text(json.dumps(whole | {"division": {"0": whole["division"]["0"]}}))
    with pytest.raises(SecateurError, match="a division of 1 layers, expected 2"):
        check_upcycled(llamas[:1], tmp_path / "out")


def test_verify_finds_other_parents_configs_and_files(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "out")
    edit_config(tmp_path / "out", num_experts_per_tok=1, extra=2)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert [one[:11] for one in faults(llamas, tmp_path / "out")] == ["config.json", "the tokeniz"]
    details = {check.claim: check.detail for check in check_upcycled(llamas, tmp_path / "out")}
    assert "num_experts_per_tok is 1, expected 2; extra is 2" in details["config.json is what the architecture needs"]
    with pytest.raises(SecateurError, match="grown from 3 models, found 1; expected p0, p1, p2, in this order"):
        check_upcycled(llamas[:1], tmp_path / "out")
    swapped = [llamas[1], llamas[0], llamas[2]]
    assert faults(swapped, tmp_path / "out")[0].startswith("the parents are those")
