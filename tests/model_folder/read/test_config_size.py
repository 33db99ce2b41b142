"""A config.json is of the size that its files show: layers by names, experts by shapes, modules by both."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from secateur.errors import SecateurError
from secateur.model_folder.read.plausible import FEW_LAYERS, MODULES, PER_TENSOR, check_plausible, no_more_than_files
from secateur.model_folder.read.tensor_files import StoredTensor


def tensors(**shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {
        name.replace("_", "."): StoredTensor(file="x", dtype="F32", shape=shape, start=0, length=0)
        for name, shape in shapes.items()
    }


FILES = tensors(model_layers_299_mlp_gate_weight=(64, 16), empty=(0, 2**40))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_hidden_layers": 301},
            "num_hidden_layers is 301, expected at most 300, as the tensors are of 300 layers",
        ),
        ({"num_experts": 65}, "num_experts is 65, expected at most 64, .* more than 64 entries along an axis"),
    ],
)
def test_more_than_the_files_can_be_of_is_refused(config: dict[str, Any], message: str) -> None:
    check_plausible({"num_hidden_layers": 300, "num_experts": 64}, FILES)
    with pytest.raises(SecateurError, match=rf"^config\.json: {message}"):
        check_plausible(config, FILES)


def test_a_part_without_tensors_may_have_a_few_layers() -> None:
    few = tensors(model_layers_1_mlp_gate_weight=(64, 16))
    check_plausible({"vision_config": {"depth": FEW_LAYERS}}, few)
    with pytest.raises(SecateurError, match=rf"vision_config\.depth is {FEW_LAYERS + 1}"):
        check_plausible({"vision_config": {"depth": FEW_LAYERS + 1}}, few)


def test_modules_are_counted_by_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.model_folder.read.plausible.MODULES", 2)
    assert (MODULES, PER_TENSOR) == (20_000, 4)
    with no_more_than_files(FILES):
        nn.Sequential(*(nn.Identity() for _ in range(2 + 4 * len(FILES))))
    with (
        pytest.raises(SecateurError, match="more than 10 modules, but the files hold 2 tensors"),
        no_more_than_files(FILES),
    ):
        nn.Sequential(*(nn.Identity() for _ in range(11)))
