"""A model is taken as loaded only where every tensor was there and none was left over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from secateur.data.batch import Batch
from secateur.errors import SecateurError
from secateur.model_folder.read.load import load_whole
from secateur.model_folder.read.model_folder import read_model_folder
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import KeptStates
from secateur.pretraining.models import load_model
from support.model_folders import config_of, saved, tensors_of, write

NORM = "model.norm.weight"


def test_a_whole_model_is_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    model = load_whole(read_model_folder(tmp_path / "model"), torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    norm = tensors_of(tmp_path / "model")[NORM]
    assert torch.equal(model.get_parameter(NORM), norm.to(torch.float64))


def test_a_model_without_one_of_its_tensors_is_refused_with_its_name(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    tensors = tensors_of(tmp_path / "model")
    del tensors[NORM]
    folder = write(tmp_path / "less", config_of("mixtral"), tensors)
    weights = r"config.json does not fit the weights \(model-00001-of-00002.safetensors to model-00002-of-00002.saf"
    with pytest.raises(SecateurError, match=rf"less: {weights}.* does not load it whole: .*missing.*{NORM}"):
        load_whole(read_model_folder(folder))


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_file_at_fault_is_named_where_transformers_does_not_load_a_folder(tmp_path: Path) -> None:
    whole = tmp_path / "model"
    saved("qwen3_moe", whole)
    for name, changes, message in (
        ("config.json", {"dtype": 2**40}, r"config\.json, model type 'qwen3_moe': dtype is 1099511627776, expected"),
        ("generation_config.json", {"pad_token_id": [[[1]]]}, r"generation_config\.json: transformers cannot use it"),
        (
            "config.json",
            {"vocab_size": 99},
            r"config\.json does not fit the weights: lm_head\.weight is \(64, 32\), expected",
        ),
    ):
        kept = (whole / name).read_text()
        edit(whole, name, **changes)
        with pytest.raises(SecateurError, match=f"{whole}.*{message}"):
            load_whole(read_model_folder(whole))
        if "dtype" in changes:  # which `pretrain` does not look at
            (whole / name).write_text(kept)
            continue
        with pytest.raises(SecateurError, match=f"{whole}.*{message if name != 'config.json' else name}"):
            load_model(whole)  # of `pretrain --model`
        (whole / name).write_text(kept)
    edit(whole, "config.json", vocab_size=99)
    streamed = StreamedModel(read_model_folder(whole))
    with pytest.raises(
        SecateurError, match=r"config\.json does not fit the weights: .* is \(64, 32\), expected \(99, 32\)"
    ):
        streamed.run_layers([Batch(input_ids=torch.ones(1, 4, dtype=torch.long))], KeptStates())
