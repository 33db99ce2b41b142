"""Experts that are whole FFNs, of several parents (btx) or of one (copy), cut or not: what the stock model computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from secateur.upcycling.upcycle import upcycle
from support.dense_models import parents_in
from support.fresh import in_fresh
from support.grown import NEAR, always, change_routers, faults, logits, model_in, tensors

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_mixture_of_equal_parents_is_the_parent(kind: str, tmp_path: Path) -> None:
    parents = parents_in(tmp_path, kind, 2, share=0.0)
    upcycle(parents, tmp_path / "out", router_std=1.0)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == TARGETS[kind]
    assert torch.allclose(logits(tmp_path / "out"), logits(parents[0]), **NEAR)


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled positions": ("llama", {"rope_parameters": LLAMA_3}),
    "scaled positions, Qwen2-MoE": ("llama", {"rope_parameters": LLAMA_3, "target": "qwen2_moe"}),
    "heads of another width": ("llama", {"head_dim": 16}),
    "heads of another width, Qwen2-MoE": ("llama", {"head_dim": 16, "target": "qwen2_moe"}),
    "a window": ("mistral", {"sliding_window": 5}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "another epsilon": ("qwen3", {"rms_norm_eps": 0.1}),
}


@pytest.mark.parametrize("case", ODD)
def test_what_a_config_says_of_layers_is_kept(case: str, tmp_path: Path) -> None:
    kind, changes = ODD[case]
    target = changes.get("target")
    parents = parents_in(tmp_path, kind, 2, share=0.0, **{key: changes[key] for key in changes if key != "target"})
    upcycle(parents, tmp_path / "out", target=target, router_std=1.0)
    assert torch.allclose(logits(tmp_path / "out"), logits(parents[0]), **NEAR)
    assert not faults(parents, tmp_path / "out")


def test_buffers_that_earlier_versions_stored_are_left_out(llamas: list[Path], tmp_path: Path) -> None:
    parents = [Path(shutil.copytree(parent, tmp_path / parent.name)) for parent in llamas[:2]]
    stored = tensors(parents[0]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored, parents[0] / "model.safetensors", {"format": "pt"})
    upcycle(parents, tmp_path / "out")
    assert "inv_freq" not in " ".join(tensors(tmp_path / "out"))
    assert not faults(parents, tmp_path / "out")


@pytest.mark.process
def test_it_loads_in_stock_transformers_with_nothing_of_ours(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "btx", granularity=2)
    split: dict[str, Any] = {"form": "split", "experts": 6, "top_k": 2, "router": "random"}
    upcycle(llamas[:1], tmp_path / "split", **split)
    upcycle(llamas[:1], tmp_path / "copy", form="copy", experts=3)
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for form in ("btx", "split", "copy"):
    model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + form, output_loading_info=True)
    found = model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
    print(type(model).__name__, found.shape[1] > 5, any(info.values()), "secateur" in sys.modules)
"""
    said = in_fresh(program).splitlines()
    assert said == [
        f"{name} True False False" for name in ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM")
    ]


@pytest.mark.parametrize("kind", TARGETS)
def test_every_tensor_is_a_copy_or_the_mean_of_the_parents(kind: str, tmp_path: Path) -> None:
    parents = parents_in(tmp_path, kind, 3, dtype=torch.bfloat16)
    upcycle(parents, tmp_path / "out")
    made, sources = tensors(tmp_path / "out"), [tensors(parent) for parent in parents]
    experts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    mixtral = TARGETS[kind] == "mixtral"
    for name in sources[0]:
        if ".mlp." not in name:
            mean = torch.stack([one[name] for one in sources]).double().mean(0)
            assert torch.equal(made.pop(name), mean.to(torch.bfloat16)), name
            continue
        layer, role = name.split(".mlp.")[0], name.split(".")[-2]
        for number, one in enumerate(sources):
            new = f"block_sparse_moe.experts.{number}.{experts[role]}" if mixtral else f"mlp.experts.{number}.{role}"
            assert torch.equal(made.pop(f"{layer}.{new}.weight"), one[name])
    assert all("gate" in name or "shared_expert" in name for name in made)
    assert sum(tensor.numel() for name, tensor in made.items() if "shared_expert." in name) == 0


def test_the_rest_may_come_from_one_parent(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "out", attention_from=1)
    made, parent = tensors(tmp_path / "out"), tensors(llamas[1])
    assert all(torch.equal(made[name], parent[name]) for name in parent if ".mlp." not in name)
    assert not faults(llamas, tmp_path / "out")


@pytest.mark.parametrize(("granularity", "top_k"), [(2, 2), (2, 4), (3, 3), (6, 18)])
def test_cutting_changes_nothing_at_the_start(llamas: list[Path], tmp_path: Path, granularity: int, top_k: int) -> None:
    upcycle(llamas, tmp_path / "whole", top_k=top_k // granularity, router_std=1.0)
    upcycle(llamas, tmp_path / "cut", top_k=top_k, granularity=granularity, router_std=1.0)
    whole, cut = model_in(tmp_path / "whole"), model_in(tmp_path / "cut")
    assert cut.config.num_local_experts == 3 * granularity
    assert cut.config.intermediate_size == 48 // granularity
    assert torch.allclose(logits(whole), logits(cut), **NEAR)
    rows = tensors(tmp_path / "cut")["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(rows, rows[::granularity].repeat_interleave(granularity, dim=0))
    assert len(rows.unique(dim=0)) == 3
    assert not faults(llamas, tmp_path / "cut")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"form": "btx", "granularity": 3},
        {"form": "bam", "kv": "shared"},
        {"form": "copy", "experts": 2, "noise": 0.1},
        {"form": "split", "experts": 3, "top_k": 2, "router": "random"},
    ],
    ids=lambda options: str(options["form"]),
)
def test_half_precision_is_rounded_once(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    parents = parents_in(tmp_path, count=1 if options["form"] in ("copy", "split") else 3, dtype=dtype)
    upcycle(parents, tmp_path / "out", **options)
    made = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    assert not faults(parents, tmp_path / "out")
    if options["form"] == "split":
        old = tensors(parents[0])["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(made["model.layers.0.mlp.experts.0.down_proj.weight"], (old[:, :16].double() * 3).to(dtype))


def test_without_equal_rows_cutting_would_change_it(llamas: list[Path], tmp_path: Path) -> None:
    upcycle(llamas, tmp_path / "whole", top_k=1)
    upcycle(llamas, tmp_path / "cut", top_k=2, granularity=2)
    change_routers(tmp_path / "cut", lambda rows: torch.randn_like(rows))
    assert not torch.allclose(logits(tmp_path / "whole"), logits(tmp_path / "cut"), atol=1e-2)
    assert faults(llamas, tmp_path / "cut")


def test_a_token_routed_to_one_parent_gets_its_ffn(llamas: list[Path], tmp_path: Path) -> None:
    """With the rest of parent 2 and routers that always choose its pieces, the mixture is parent 2."""
    upcycle(llamas, tmp_path / "out", attention_from=2, granularity=4, top_k=4)
    model, parent = model_in(tmp_path / "out"), model_in(llamas[2])
    always(model, [8, 9, 10, 11], 0.25)
    assert torch.allclose(logits(model), logits(parent), **NEAR)


@pytest.mark.parametrize("granularity", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_copies_of_one_model_are_the_model(kind: str, granularity: int, tmp_path: Path) -> None:
    parents = parents_in(tmp_path, kind, 1)
    upcycle(parents, tmp_path / "out", form="copy", experts=3, granularity=granularity, router_std=1.0)
    assert torch.allclose(logits(tmp_path / "out"), logits(parents[0]), **NEAR)
    assert not faults(parents, tmp_path / "out")


def test_weights_that_are_not_renormalised_are_made_up_for(tmp_path: Path) -> None:
    """2410.07524: the weights of the chosen sum to top-k / experts, so the down projections are times its inverse."""
    parents = parents_in(tmp_path, "qwen3", 1)
    upcycle(parents, tmp_path / "out", form="copy", experts=2, granularity=3, top_k=3, renormalise=False)
    old, new = tensors(parents[0]), tensors(tmp_path / "out")
    part = new["model.layers.0.mlp.experts.4.down_proj.weight"]
    assert torch.equal(part, old["model.layers.0.mlp.down_proj.weight"][:, 16:32] * 6)
    change_routers(tmp_path / "out", torch.zeros_like)
    model = model_in(tmp_path / "out")
    always(model, [0, 4, 2])  # at a zero router all are equal, and which are chosen is left to chance
    assert torch.allclose(logits(model), logits(parents[0]), **NEAR)


def test_noise_is_of_the_size_that_was_asked_for_and_from_the_seed(llamas: list[Path], tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        upcycle(llamas[:1], tmp_path / name, form="copy", experts=2, noise=0.05, seed=seed)
    old = tensors(llamas[0])["model.layers.0.mlp.up_proj.weight"]
    new = [tensors(tmp_path / name) for name in ("one", "again", "two")]
    copies = [new[0][f"model.layers.0.block_sparse_moe.experts.{number}.w3.weight"] for number in range(2)]
    for copy in copies:
        assert float((copy - old).std() / old.square().mean().sqrt()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(*copies)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert not torch.equal(copies[0], new[2]["model.layers.0.block_sparse_moe.experts.0.w3.weight"])
    assert not faults(llamas[:1], tmp_path / "one")


def test_tied_embeddings_and_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = parents_in(tmp_path, "qwen2", 2, share=0.0, tie_word_embeddings=True)
    monkeypatch.setattr("secateur.upcycling.write.SHARD", 50_000)
    upcycle(parents, tmp_path / "out", router_std=1.0)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    sizes = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            sizes += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes
    assert "lm_head.weight" not in index["weight_map"]
    assert torch.allclose(logits(tmp_path / "out"), logits(parents[0]), **NEAR)
    assert not faults(parents, tmp_path / "out")
