"""The torch types by safetensors' names, compared with what safetensors itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.files.dtypes import TORCH_DTYPES, torch_dtypes
from secateur.files.safetensors_header import BITS, read_header


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_a_tensor_of_the_type_is_written_under_the_name(name: str, tmp_path: Path) -> None:
    save_file({"t": torch.zeros(3, dtype=TORCH_DTYPES[name])}, tmp_path / "t.safetensors")
    assert read_header(tmp_path / "t.safetensors").entries["t"].dtype == name
    assert TORCH_DTYPES[name].itemsize * 8 == BITS[name]


def test_some_of_the_types_come_in_the_order_of_their_names() -> None:
    assert list(torch_dtypes("F32 BF16").items()) == [("F32", torch.float32), ("BF16", torch.bfloat16)]
