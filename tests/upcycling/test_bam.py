"""A BAM grown from folders: every tensor a copy or an average, for every block; what it computes, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.models.bam import BamForCausalLM
from secateur.upcycling.checks import check_upcycled
from secateur.upcycling.upcycle import upcycle
from support.dense_models import parents_in
from support.grown import faults
from support.tiny_bam import PARENTS, dense_parent, mixed, random_ids

every_parent = pytest.mark.parametrize("name", PARENTS)
ROUTERS = ("router.weight", "mlp.gate.weight")


def children(name: str, root: Path, count: int = 2, share: float = 0.1) -> list[Path]:
    folders = []
    for number in range(count):
        model = dense_parent(name, seed=0)
        torch.manual_seed(number)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(torch.randn_like(tensor) * share * tensor.std() * bool(number))
        folders.append(root / f"{name}-{number}")
        model.save_pretrained(folders[-1])
    return folders


def model_in(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, BamForCausalLM)
    assert not any(info.values()), info
    return model.eval()


@every_parent
@pytest.mark.parametrize("kv", ["experts", "shared"])
def test_it_is_the_bam_of_its_parents(name: str, kv: Any, tmp_path: Path) -> None:
    """Beside one put together in memory, by other code: copies equal, averages to rounding, and the config."""
    parents = children(name, tmp_path)
    upcycle(parents, tmp_path / "out", form="bam", kv=kv, router_std=0.5)
    made = model_in(tmp_path / "out")
    dense = [AutoModelForCausalLM.from_pretrained(parent) for parent in parents]
    wanted = mixed(name, dense, kv_experts=kv == "experts")
    theirs = dict(wanted.named_parameters())
    for key, tensor in made.named_parameters():
        if key.endswith(ROUTERS):
            assert 0.2 < float(tensor.detach().std()) < 0.8
            theirs[key].data.copy_(tensor)
        elif "mlp" in key or ("self_attn" in key and (kv == "experts" or "q_" in key or "o_" in key)):
            assert torch.equal(tensor, theirs[key]), key
        else:
            torch.testing.assert_close(tensor, theirs[key], rtol=2e-7, atol=1e-8)
    ids = random_ids(2, 11)
    torch.testing.assert_close(logits_of(made, ids), logits_of(wanted, ids), rtol=1e-4, atol=2e-5)
    assert not faults(parents, tmp_path / "out")


@every_parent
def test_equal_parents_and_a_weight_of_1_are_the_parent(name: str, tmp_path: Path) -> None:
    parents, ids = children(name, tmp_path, share=0.0), random_ids(2, 11)
    upcycle(parents, tmp_path / "out", form="bam", renormalise=True, router_std=1.0)
    parent = logits_of(AutoModelForCausalLM.from_pretrained(parents[0]), ids)
    torch.testing.assert_close(logits_of(model_in(tmp_path / "out"), ids), parent, rtol=1e-4, atol=2e-5)
    upcycle(parents, tmp_path / "small", form="bam")  # its FFN branch is scaled by about a half
    assert not torch.allclose(logits_of(model_in(tmp_path / "small"), ids), parent, atol=1e-2)


@pytest.mark.parametrize("kv", ["experts", "shared"])
def test_it_has_as_many_parameters_as_the_formula_says(kv: Any, tmp_path: Path) -> None:
    """Section 7 of the paper's reading: one norm a layer, no biases, tied embeddings; F is gate and up together."""
    parents = children("cohere", tmp_path, 3)
    found = upcycle(parents, tmp_path / "out", form="bam", kv=kv, dry_run=True).num_bytes // 4
    v, d, layers, f, n, kv_width = 48, 16, 2, 2 * 12, 3, 2 * 4
    nkv = n if kv == "experts" else 1
    layer = d + n * 2 * d * d + nkv * 2 * d * kv_width + n * (d * f + d * f // 2) + 2 * n * d
    assert found == v * d + d + layers * layer


def test_options_of_its_config(tmp_path: Path) -> None:
    parents = children("llama", tmp_path, 3)
    result = upcycle(parents, tmp_path / "out", form="bam", top_k=2, attention_top_k=1, router_std=0.1, kv="shared")
    config = model_in(tmp_path / "out").config
    assert (config.num_experts, config.num_attention_experts, config.num_experts_per_tok) == (3, 3, 2)
    assert (config.attention_top_k, config.kv_experts, config.renormalise_top1) == (1, False, False)
    assert config.router_init_std == 0.1
    assert (result.model_type, result.experts, result.top_k) == ("bam", 3, 2)
    assert "no parent's function" in result.to_json()["function"]


def test_a_router_that_is_missing_is_an_error(tmp_path: Path) -> None:
    parents = children("llama", tmp_path)
    upcycle(parents, tmp_path / "out", form="bam")
    path = tmp_path / "out/model.safetensors"
    found = load_file(path)
    del found["model.layers.1.self_attn.router.weight"]
    save_file(found, path, {"format": "pt"})
    with pytest.raises(SecateurError, match=r"model\.layers\.1\.self_attn\.router\.weight missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [one[:10] for one in faults(parents, tmp_path / "out")] == ["the folder"]


@pytest.mark.parametrize(
    ("key", "claim"),
    [
        ("model.layers.0.self_attn.o_proj.weight", "every expert"),
        ("model.layers.1.mlp.experts.gate_up_proj", "every expert"),
        ("model.layers.1.self_attn.k_proj.weight", "every averaged"),
        ("lm_head.weight", "every averaged"),
        ("model.layers.0.self_attn.router.weight", "the routers"),
    ],
)
def test_verify_finds_what_was_changed(key: str, claim: str, tmp_path: Path) -> None:
    parents = children("llama", tmp_path)
    upcycle(parents, tmp_path / "out", form="bam", kv="shared")
    path = tmp_path / "out/model.safetensors"
    found = load_file(path)
    found[key].view(-1)[7:8].mul_(1 + 1e-6)
    save_file(found, path, {"format": "pt"})
    assert [one[: len(claim)] for one in faults(parents, tmp_path / "out")] == [claim]


def test_dry_run_record_and_report(tmp_path: Path) -> None:
    parents = parents_in(tmp_path, count=2)
    (text := tmp_path / "text").write_text("it was the best of times " * 9)
    dry = upcycle(parents, tmp_path / "out", form="bam", dry_run=True).to_json()
    done = upcycle(parents, tmp_path / "out", form="bam", text=text).to_json()
    assert dry | {"comparison": done["comparison"]} == done
    assert len(done["comparison"]["parents"]) == 2
    details = {check.claim: check.detail for check in check_upcycled(parents, tmp_path / "out")}
    assert "upcycle.json says of every tensor what it was made of" in details
    layers, keys_and_values, experts, heads, width, num_bytes = 2, 2, 2, 2, 8, 2
    assert done["bam"]["cache_bytes_per_token"] == layers * keys_and_values * experts * heads * width * num_bytes
    shared = upcycle(parents, tmp_path / "out2", form="bam", kv="shared", dry_run=True).to_json()
    assert shared["bam"]["cache_bytes_per_token"] == done["bam"]["cache_bytes_per_token"] // 2
    assert done["bam"]["published"]["gain_over_btx"] == {"590M": 0.095, "2B": 0.024}
    card = (tmp_path / "out/README.md").read_text()
    assert "import secateur" in card
    assert "9.5 %" in card


def test_its_experts_are_experts(tmp_path: Path) -> None:
    parents = children("mistral", tmp_path, 3)
    upcycle(parents, tmp_path / "out", form="bam")
    assert secateur.inspect(tmp_path / "out").experts == {0: 3, 1: 3}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "stock": ("cohere", {"form": "btx"}, "model type 'cohere': no stock Mixture-of-Experts of this form is known"),
    "target": ("llama", {"target": "mixtral"}, "--target mixtral: --form bam becomes a bam"),
    "kv": ("llama", {"kv": "none"}, "--kv none: expected experts, shared"),
    "attention": ("llama", {"attention_top_k": 3}, "--attention-top-k 3: only 2 attention experts"),
    "top-k": ("llama", {"top_k": 3}, "--top-k 3: only 2 experts"),
    "granularity": ("llama", {"granularity": 2}, "--granularity: --form bam does not take it"),
    "kv of btx": ("llama", {"form": "btx", "kv": "shared"}, "--kv: --form btx does not take it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    name, options, message = REFUSED[case]
    with pytest.raises(SecateurError, match=message):
        upcycle(children(name, tmp_path), tmp_path / "out", **{"form": "bam", **options})
    assert not (tmp_path / "out").exists()


def test_a_norm_of_queries_that_it_has_no_place_for(tmp_path: Path) -> None:
    parents = children("cohere", tmp_path)
    for parent in parents:
        path = parent / "config.json"
        path.write_text(path.read_text().replace('"use_qk_norm": false', '"use_qk_norm": true'))
    with pytest.raises(SecateurError, match="use_qk_norm is True, which a BAM has no place for"):
        upcycle(parents, tmp_path / "out", form="bam")
