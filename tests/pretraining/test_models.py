"""The model of a run: from a preset, a config.json, or a folder with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from secateur.data.tokenizer import train_tokenizer
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.pretraining.models import given_tokenizer, load_model, make_model, model_config, model_facts
from secateur.pretraining.options import PretrainOptions
from secateur.pretraining.presets import PRESETS
from support.small_runs import TINY

CONFIG: dict[str, Any] = {"model_type": "qwen3_moe", "vocab_size": 300, **TINY["qwen3_moe"]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a text about experts"] * 3, vocab_size=270)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_moe_with_the_vocabulary_of_its_tokenizer(
    preset: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = model_config(PretrainOptions(preset=preset), tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    with torch.device("meta"):
        moe = describe_moe(AutoModelForCausalLM.from_config(config))
    assert set(moe.counts.values()) == {16}
    assert moe.top_k == 2


def test_the_presets_cover_the_kinds_of_attention() -> None:
    kinds = " ".join(attention for _, attention, _ in PRESETS.values())
    for kind in ("full multi-head", "grouped-query", "latent", "sliding window", "linear"):
        assert kind in kinds


def test_a_field_changes_a_preset_and_a_config_file(config_file: Path) -> None:
    for options in (
        PretrainOptions(preset="olmoe", overrides={"num_hidden_layers": 7}),
        PretrainOptions(config=str(config_file), vocab_size=300, overrides={"num_hidden_layers": 7}),
    ):
        assert model_config(options, None).num_hidden_layers == 7


def test_without_a_tokenizer_a_preset_has_the_size_that_will_be_trained() -> None:
    assert model_config(PretrainOptions(vocab_size=512), None).vocab_size == 512


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": "gpt5"}, ["--preset 'gpt5'", "qwen3_moe", "gpt_oss"]),
        ({"overrides": {"hidden_sise": 3}}, ["--set hidden_sise", "no such field"]),
        ({"overrides": {"hidden_size": "wide"}}, ["--preset qwen3_moe", "hidden_size"]),
        ({"config": "/missing/config.json"}, ["--config /missing/config.json"]),
        ({"model": "/missing"}, ["--model /missing", "config.json"]),
    ],
)
def test_a_model_that_cannot_be_named_is_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(SecateurError) as caught:
        model_config(PretrainOptions(**changes), None)
    for words in named:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "not JSON in UTF-8"),
        ("{", "not JSON in UTF-8"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "vit"}', "no causal language model"),
    ],
)
def test_a_file_that_is_no_config_of_a_causal_model_is_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SecateurError, match=r"c\.json") as caught:
        model_config(PretrainOptions(config=str(tmp_path / "c.json")), None)
    assert named in str(caught.value)


def test_a_tokenizer_larger_than_the_config_is_refused(config_file: Path) -> None:
    large = train_tokenizer([" ".join(f"word{i}" for i in range(300))], vocab_size=400)
    with pytest.raises(SecateurError, match=r"tokenizer TokenizersBackend: found 400 tokens.*300"):
        model_config(PretrainOptions(config=str(config_file), vocab_size=300), large)


def test_a_tokenizer_that_would_be_trained_too_large_is_refused_before_it_is(config_file: Path) -> None:
    with pytest.raises(SecateurError, match=r"--vocab-size is 4096.*vocab_size of 300"):
        model_config(PretrainOptions(config=str(config_file)), None)
    with pytest.raises(SecateurError, match=r"--vocab-size is 4096.*vocab_size of 300"):
        model_config(PretrainOptions(overrides={"vocab_size": 300}), None)


def test_weights_are_float32_whatever_the_config_says(config_file: Path) -> None:
    config_file.write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}))
    options = PretrainOptions(config=str(config_file), vocab_size=300)
    model = make_model(options, model_config(options, None))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(config_file.parent / "saved")
    assert {parameter.dtype for parameter in load_model(config_file.parent / "saved").parameters()} == {torch.float32}


def test_equal_seeds_make_equal_weights(config_file: Path) -> None:
    options = PretrainOptions(config=str(config_file), vocab_size=300)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(make_model(options, model_config(options, None)).state_dict())
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_a_folder_gives_its_own_weights_and_its_own_tokenizer(
    model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = PretrainOptions(model=str(model_folder))
    found = given_tokenizer(options)
    assert found is not None
    assert found.get_vocab() == tokenizer.get_vocab()
    model = make_model(options, model_config(options, found))
    saved = AutoModelForCausalLM.from_pretrained(model_folder)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_trained_model_without_its_tokenizer_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(SecateurError, match=r"--model .*found no tokenizer.*--tokenizer"):
        given_tokenizer(PretrainOptions(model=str(tmp_path)))
    assert given_tokenizer(PretrainOptions(model=str(tmp_path), tokenizer=str(model_folder))) is not None


def test_without_folder_a_tokenizer_is_yet_to_be_trained() -> None:
    assert given_tokenizer(PretrainOptions()) is None


@pytest.mark.parametrize("change", ["missing", "shape", "left over", "truncated"])
def test_weights_that_do_not_fit_exactly_are_refused(model_folder: Path, tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((model_folder / "config.json").read_text())
    tensors = load_file(model_folder / "model.safetensors")
    if change == "missing":
        del tensors["model.norm.weight"]
    if change == "shape":
        tensors["model.norm.weight"] = torch.zeros(33)
    if change == "left over":
        tensors["model.extra.weight"] = torch.zeros(3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if change == "truncated":
        content = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SecateurError, match=str(tmp_path)):
        load_model(tmp_path)


def test_the_facts_of_a_model_are_json(tokenizer: PreTrainedTokenizerBase) -> None:
    options = PretrainOptions(preset="deepseek_v3")
    with torch.device("meta"):
        moe = describe_moe(AutoModelForCausalLM.from_config(model_config(options, tokenizer)))
    facts = json.loads(json.dumps(model_facts(options, moe)))
    assert facts["model_type"] == "deepseek_v3"
    assert facts["experts"] == {"1": 16, "2": 16, "3": 16}
    assert facts["layers"] == 4
    assert facts["parameters"] == moe.num_parameters
