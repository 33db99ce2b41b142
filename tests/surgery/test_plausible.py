"""Numbers of a config that no model can have are refused by their key, before a model is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.surgery.plausible import check_counts, no_larger_buffers_than, no_more_modules_than

MOST = {"layers": 4, "experts": 8, "why": "as the tensors show"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, expected at most 4, as the tensors show"),
        ({"num_experts": 9}, "num_experts is 9, expected at most 8, as the tensors show"),
        ({"num_experts": [2, 9]}, "num_experts is 9, expected at most 8"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected at most 4, as there are 4"),
        ({"num_experts": 4, "n_group": 5}, "n_group is 5, expected at most 4, as there are 4 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most 8"),
        ({"text_config": {"inner": {"n_layer": 5}}}, r"text_config\.inner\.n_layer is 5, expected at most 4"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5, expected a number from 0 to 1"),
    ],
)
def test_a_number_that_cannot_be_meant_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=f"^{message}"):
        check_counts(config, **MOST)  # type: ignore[arg-type]


def test_numbers_up_to_the_most_can_be_meant() -> None:
    inner = {"num_hidden_layers": 4, "num_experts": [2, 8], "num_experts_per_tok": 8, "dropout": 1, "n_group": 8}
    check_counts(inner | {"text_config": inner, "num_experts_per_tok": "9"}, **MOST)  # type: ignore[arg-type]


def test_a_model_of_too_large_buffers_is_not_built() -> None:
    with no_larger_buffers_than(64, "but the files hold 0 bytes"):
        nn.Module().register_buffer("table", torch.empty(16, device="meta"))
        with pytest.raises(SecateurError, match="a model with table of 68 bytes, but the files hold 0 bytes"):
            nn.Module().register_buffer("table", torch.empty(17, device="meta"))
    nn.Module().register_buffer("table", torch.empty(17, device="meta"))
    nn.Module().register_buffer("none", None)


def test_a_model_of_too_many_modules_is_not_built() -> None:
    with no_more_modules_than(3, "but there are few tensors"):
        nn.Sequential(*(nn.Identity() for _ in range(3)))
    with (
        pytest.raises(SecateurError, match="a model of more than 3 modules, but there are few tensors"),
        no_more_modules_than(3, "but there are few tensors"),
    ):
        nn.Sequential(*(nn.Identity() for _ in range(4)))
    nn.Sequential(*(nn.Identity() for _ in range(9)))
