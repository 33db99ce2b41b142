"""Router change from two folders, or from a folder and a LoRA adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.criteria.router_change import RouterChange
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.model_folder.measure.router_change import router_changes
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from support.model_folders import saved
from support.tiny_models import ONE_OF_EACH_LAYOUT, families, tiny_model
from support.tuned_folders import ALPHA, RANK, finetuned, lora_of, routers, write_adapter


def found(folder: Path) -> ModelFolder:
    return read_model_folder(folder)


def same(left: RouterChange, right: RouterChange) -> bool:
    fields = ("norm_before", "norm_after", "norm_of_difference")
    return all(torch.allclose(getattr(left, one), getattr(right, one), rtol=1e-6, atol=1e-7) for one in fields)


@pytest.mark.parametrize("name", families(ONE_OF_EACH_LAYOUT))
def test_the_change_is_that_of_the_live_routers(name: str, tmp_path: Path) -> None:
    before, after = saved(name, tmp_path / "base"), finetuned(name)
    after.save_pretrained(tmp_path / "tuned")
    changes = router_changes(tmp_path / "tuned", found(tmp_path / "base"))
    moe = describe_moe(before)
    assert list(changes) == list(moe.blocks)
    for layer, change in changes.items():
        count = moe.counts[layer]
        rows = [routers(model)[layer].detach()[:count] for model in (before, after)]
        assert same(change, RouterChange.of_rows("router", *rows))
        assert float(change.norm_of_difference.min()) > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_adapter_is_as_good_as_the_merged_model(name: str, tmp_path: Path) -> None:
    base = found_after_saving(name, tmp_path / "base")
    tensors, merged = lora_of(tiny_model(name))
    merged.save_pretrained(tmp_path / "merged")
    by_adapter = router_changes(write_adapter(tmp_path / "adapter", tensors), base)
    by_model = router_changes(tmp_path / "merged", base)
    for layer, change in by_model.items():
        assert torch.allclose(by_adapter[layer].norm_after, change.norm_after, rtol=1e-5)
        assert torch.allclose(by_adapter[layer].norm_of_difference, change.norm_of_difference, rtol=1e-4)


def found_after_saving(name: str, folder: Path) -> ModelFolder:
    saved(name, folder)
    return found(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return found_after_saving("qwen3_moe", tmp_path_factory.mktemp("made") / "base")


def test_rank_stabilised_adapters_and_routers_trained_as_a_whole_are_read(base: ModelFolder, tmp_path: Path) -> None:
    tensors, _ = lora_of(tiny_model("qwen3_moe"))
    plain = router_changes(write_adapter(tmp_path / "plain", tensors, r=4, lora_alpha=8), base)  # a scale of 2
    stable = router_changes(write_adapter(tmp_path / "stable", tensors, r=4, lora_alpha=4, use_rslora=True), base)
    assert all(same(plain[layer], stable[layer]) for layer in plain)

    tuned = finetuned("qwen3_moe")
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    whole = {f"base_model.model.{names[id(one)]}": one.detach() for one in routers(tuned).values()}
    tuned.save_pretrained(tmp_path / "tuned")
    a_number_each = {name.replace(".weight", ".bias"): torch.ones(len(value)) for name, value in whole.items()}
    by_whole = router_changes(write_adapter(tmp_path / "whole", whole | a_number_each), base)
    by_model = router_changes(tmp_path / "tuned", base)
    assert all(same(by_whole[layer], by_model[layer]) for layer in by_model)


def test_an_adapter_that_peft_itself_wrote_is_read(base: ModelFolder, tmp_path: Path) -> None:
    import peft  # a slow import

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    tuned = peft.get_peft_model(tiny_model("qwen3_moe"), config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=draw)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    by_adapter = router_changes(tmp_path / "adapter", base)
    by_model = router_changes(tmp_path / "merged", base)
    for layer, change in by_model.items():
        assert torch.allclose(by_adapter[layer].norm_after, change.norm_after, rtol=1e-5)


def adapter_without(end: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensors = lora_of(tiny_model("qwen3_moe"))[0]
        return write_adapter(folder, {name: value for name, value in tensors.items() if not name.endswith(end)})

    return make


def adapter_with(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_adapter(folder, lora_of(tiny_model("qwen3_moe"))[0], **changes)


def model_of(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        finetuned(name).save_pretrained(folder)
        return folder

    return make


def untouched(folder: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def partly_frozen(folder: Path) -> Path:
    """Fine-tuned, but for the router of layer 1."""
    model, before = finetuned("qwen3_moe"), routers(tiny_model("qwen3_moe"))
    with torch.no_grad():
        routers(model)[1].copy_(before[1])
    model.save_pretrained(folder)
    return folder


def other_attention(folder: Path) -> Path:
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    return write_adapter(folder, tensors)


def pickled_adapter(folder: Path) -> Path:
    adapter_with()(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another family": (model_of("mixtral"), "is a 'mixtral' and .* a 'qwen3_moe', expected one family"),
    "routers that were not trained": (untouched, "its routers are those of"),
    "a router that was not trained": (partly_frozen, r"its routers of layers \[1\] are those of"),
    "adapter without routers": (other_attention, "has no tensor of a router"),
    "adapter of another kind": (adapter_with(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "DoRA": (adapter_with(use_dora=True), "use_dora is on; merge this adapter"),
    "ranks of single modules": (adapter_with(rank_pattern={"gate": 4}), "rank_pattern is on"),
    "an adapter whose start changed the model": (
        adapter_with(init_lora_weights="pissa_niter_4"),
        "init_lora_weights is",
    ),
    "repeated layers": (adapter_with(layer_replication=[[0, 2], [1, 3]]), "layer_replication is on"),
    "half an adapter": (adapter_without("lora_B.weight"), "the adapter has .'lora_A.weight'., expected"),
    "rank 0": (adapter_with(r=0), "r is 0 and lora_alpha 6, expected numbers"),
    "a pickled adapter": (pickled_adapter, "pickled files are never opened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_nothing_or_does_not_belong_is_refused(case: str, base: ModelFolder, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    other = make(tmp_path / "other")
    with pytest.raises(SecateurError, match=message) as caught:
        router_changes(other, base)
    assert str(caught.value).startswith(str(other))


def test_an_adapter_that_says_nothing_is_named_by_its_files(tmp_path: Path) -> None:
    base = found_after_saving("qwen3_moe", tmp_path / "base")
    name = r"other \(adapter_config\.json, adapter_model\.safetensors\): "
    for change, message in ({"lora_alpha": 0}, "its routers are those of"), ({"lora_alpha": 1e308}, "not finite"):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        adapter_with(**change)(tmp_path / "other")
        with pytest.raises(SecateurError, match=name + f".*{message}"):
            router_changes(tmp_path / "other", base)


def test_models_of_other_sizes_are_refused(base: ModelFolder, tmp_path: Path) -> None:
    config = tiny_model("qwen3_moe").config
    for key, value, message in (("num_local_experts", 12, "has 12 and 8 experts"), ("hidden_size", 48, r"\(8, 48\)")):
        changed = type(config).from_dict(config.to_dict() | {key: value})
        tiny_model("qwen3_moe").__class__(changed).save_pretrained(tmp_path / key)
        with pytest.raises(SecateurError, match=message):
            router_changes(tmp_path / key, base)
