"""A model is taken as loaded only where every tensor was there and none was left over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import SecateurError
from secateur.model_folder.read.load import load_whole
from secateur.model_folder.read.model_folder import read_model_folder
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
    with pytest.raises(SecateurError, match=rf"less: transformers does not load it whole: .*missing.*{NORM}"):
        load_whole(read_model_folder(folder))
