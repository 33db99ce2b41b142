"""A BAM goes through the commands like any other model: its FFN experts are experts, its attention experts stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.commands.inspect import _summary
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import SecateurError
from secateur.families import describe_moe, logits_of
from secateur.finetuning.finetune import finetune
from secateur.folder_kinds.verify import verify
from secateur.model_folder.evaluation.evaluate import evaluate
from secateur.model_folder.measure.observe import observe
from secateur.model_folder.prune import prune
from secateur.model_folder.read.inspect import inspect
from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.models.bam.losses import router_losses
from secateur.pretraining import run as program
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.run import run_pretraining
from secateur.stats import RouterStats
from secateur.surgery.module import check_model, prune_model_
from secateur.surgery.oracle import barred_experts
from secateur.train.balance import attach_balance
from support.claims import fallen, not_checked
from support.long_tests import long
from support.model_folders import loaded, run_card, tensors_of
from support.models_with_text import TEXT
from support.small_runs import SMALL, light_report
from support.tiny_bam import tiny_bam
from support.tiny_models import random_plan, random_tokens
from support.zero_slot_models import zero_slot_plan

KINDS = ["own keys", "shared keys"]
every_kind = pytest.mark.parametrize("kind", KINDS)
# What reads and writes a folder sees of the kinds other shapes and more tensors: those of the second.
long_first = pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=long), KINDS[1]])
SHORT: dict[str, Any] = {"samples": 4, "sequence_length": 16}
EXPERTS = 8


def bam(kind: str, **changes: Any) -> Any:
    fields = {"num_experts": EXPERTS, "num_attention_experts": 3, "vocab_size": 300, "initializer_range": 0.2}
    return tiny_bam(kind, dtype=torch.float32, **fields | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a kind, with a tokenizer, and text.jsonl beside them."""
    folder = tmp_path_factory.mktemp("bam")
    lines = [line for some in TEXT.values() for line in some]
    tokenizer = train_tokenizer(lines, vocab_size=300)
    for kind in KINDS:
        bam(kind).save_pretrained(folder / kind, max_shard_size="40KB")
        tokenizer.save_pretrained(folder / kind)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@every_kind
def test_inspect_counts_experts_of_the_ffn_and_names_those_of_attention(kind: str, root: Path) -> None:
    found = inspect(root / kind).to_json()
    tensors = tensors_of(root / kind)
    assert (found["model_type"], found["class"]) == ("bam", "BamForCausalLM")
    assert (found["experts"], found["top_k"], found["attention_experts"]) == ({"0": 8, "1": 8}, 1, 3)
    of_experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    of_routers = sum(tensor.nbytes for name, tensor in tensors.items() if ".mlp.gate." in name)
    assert (found["bytes"]["experts"], found["bytes"]["routers"]) == (of_experts, of_routers)
    assert "the 3 attention experts of every layer stay as they are" in "\n".join(found["limits"])
    assert "8 each, top-k 1; 3 attention experts each" in _summary(found)


@pytest.mark.slow
@long_first
def test_it_is_observed_pruned_verified_and_evaluated(kind: str, root: Path, tmp_path: Path) -> None:
    data = {"data": str(root / "text.jsonl"), **SHORT}
    observe(root / kind, tmp_path / "stats.safetensors", **data)
    stats = RouterStats.load(tmp_path / "stats.safetensors")
    assert {layer: int(one.token_count.sum()) for layer, one in stats.layers.items()} == {0: 64, 1: 64}
    prune(root / kind, tmp_path / "small", keep=0.5, allocation="global", **data)
    checks = verify(root / kind, tmp_path / "small").checks
    assert (fallen(checks), not_checked(checks)) == (set(), set()), checks
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert [type(run_card(tmp_path / "small")).__name__] == config["architectures"]
    before, after = tensors_of(root / kind), tensors_of(tmp_path / "small")
    attention = [name for name in before if "self_attn" in name]
    assert all(torch.equal(before[name], after[name]) for name in attention)
    assert config["num_attention_experts"] == 3
    losses = evaluate([str(root / kind), str(tmp_path / "small")], **data).losses
    streamed = evaluate([str(root / kind), str(tmp_path / "small")], stream=True, **data).losses
    assert losses[0] != losses[1]
    assert streamed == pytest.approx(losses, rel=1e-6)


@every_kind
def test_layers_of_different_counts_are_pruned_live_as_on_the_disk_and_train_on(kind: str, tmp_path: Path) -> None:
    model, tokens = bam(kind), random_tokens(2, 12)
    moe = describe_moe(model)
    check_model(moe)  # its losses are on, and know each layer's count
    plan = random_plan(moe, tokens)
    with barred_experts(moe, plan):
        expected = logits_of(model, tokens)
    prune_model_(moe, plan)
    assert torch.equal(logits_of(model, tokens), expected)
    counts = {layer: one.experts_after for layer, one in plan.layers.items()}
    assert len(set(counts.values())) == 2
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again).__name__ == "PrunedBamForCausalLM"
    assert describe_moe(again).counts == counts
    assert torch.equal(logits_of(again, tokens), expected)
    output = again.train()(tokens, labels=tokens)
    assert [logits.shape[1] for logits in output.router_logits] == list(counts.values())
    output.loss.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in again.model.layers)
    assert again.eval().generate(tokens[:, :4], max_new_tokens=3, min_new_tokens=3).shape == (2, 7)


def test_a_second_balance_loss_is_refused_while_its_own_are_on() -> None:
    for on in (True, False):
        moe = describe_moe(bam("own keys", output_router_logits=on))
        if on:
            with pytest.raises(SecateurError, match=r"output_router_logits: found True .*its own loss is added"):
                attach_balance(moe.model, "mixtral", blocks=moe.blocks)
        else:
            attach_balance(moe.model, "mixtral", blocks=moe.blocks).detach()


def test_a_missing_router_of_a_pruned_folder_is_an_error_too(root: Path, tmp_path: Path) -> None:
    model = bam("own keys")
    prune_model_(describe_moe(model), random_plan(describe_moe(model)))
    model.save_pretrained(tmp_path)
    for one in root.glob("own keys/token*"):
        shutil.copy(one, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.router.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SecateurError, match=r"layers\.1\.self_attn\.router\.weight missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(SecateurError, match=r"layers\.1\.self_attn\.router\.weight"):
        evaluate([str(tmp_path)], stream=True, data=str(root / "text.jsonl"), **SHORT)


def test_zero_slots_have_no_part_in_the_routers_losses(tmp_path: Path) -> None:
    model, tokens = bam("own keys"), random_tokens(2, 12)
    model.save_pretrained(tmp_path / "source")
    plan = zero_slot_plan((0, 1))
    apply_to_model(tmp_path / "source", plan, tmp_path / "out")
    again = loaded(tmp_path / "out").train()
    output = again(tokens, labels=tokens)
    kept = [list(plan.layers[layer].order) for layer in (0, 1)]
    choices = [(logits[:, own], 1) for logits, own in zip(output.router_logits, kept, strict=True)]
    assert output.router_logits[0].shape[1] == EXPERTS
    for found, expected in zip((output.load_balance_loss, output.router_z_loss), router_losses(choices), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@long_first
def test_it_is_fine_tuned_with_its_routers_losses(kind: str, root: Path, tmp_path: Path) -> None:
    words = {"data": str(root / "text.jsonl"), "sequence_length": 16, "steps": 2, "learning_rate": 1e-2, "log_steps": 1}
    record = finetune(root / kind, tmp_path / "out", **words).to_json()
    weights = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}
    assert record["router_aux_loss"] == {"from": "config", **weights}
    before, after = tensors_of(root / kind), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    quiet = finetune(root / kind, tmp_path / "quiet", router_aux_loss=0, **words).to_json()
    assert quiet["router_aux_loss"] is None
    assert record["losses"][0]["loss"] > quiet["losses"][0]["loss"]


@pytest.mark.slow
@long_first
def test_it_is_pretrained_on_and_pruned_on_the_way(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "write_report", light_report)
    shutil.copytree(root / kind, tmp_path / "model")
    short = {"steps": 8, "eval_steps": 8, "save_steps": 8, "log_steps": 4, "prune_at_step": 5, "sequence_length": 16}
    fields = {"data": (str(root / "text.jsonl"),), "model": str(tmp_path / "model"), **SMALL, **short}
    run_pretraining(PretrainOptions(**fields, gradient_checkpointing=True), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum(describe_moe(model).counts.values()) < 2 * EXPERTS
    assert model.config.num_attention_experts == 3
