"""Experts that are read to their place are those that transformers stacks and joins, and what is barred is not read."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter

from secateur.errors import SecateurError
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.stream.lazy_tensor import LazyTensor, Span, UnreadTensor
from secateur.model_folder.stream.placed import PlacingConverter, with_placing

PATTERNS = ["experts.*.gate.weight", "experts.*.up.weight"]
JOINED = WeightConverter(PATTERNS, "experts.gate_up", [MergeModulelist(dim=0), Concatenate(dim=1)])
STACKED = WeightConverter("experts.*.down.weight", "experts.down", [MergeModulelist(dim=0)])


def stored(folder: Path, tensor: Tensor, name: str) -> StoredTensor:
    """A file that is nothing but the tensor's bytes."""
    (folder / name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
    return StoredTensor(file=name, dtype=dtype, shape=tuple(tensor.shape), start=0, length=tensor.nbytes)


def unread(folder: Path, tensor: Tensor, spans: list[Span] | None = None) -> UnreadTensor:
    name = f"{len(list(folder.iterdir()))}.bin"
    given = UnreadTensor(folder, name, stored(folder, tensor, name), spans)
    return given[...].to(device="cpu", dtype=torch.bfloat16)  # type: ignore[call-arg, return-value]


def placed(converter: Any, lists: list[list[UnreadTensor]]) -> Tensor:
    (placing,) = with_placing([converter])
    one = deepcopy(placing)
    for pattern, tensors in zip(one.source_patterns, lists, strict=True):
        one.collected_tensors[pattern] = [lambda tensor=tensor: tensor for tensor in tensors]
    assert not placing.collected_tensors  # which belongs to this target alone
    (result,) = one.convert("model.experts.x", model=None, loading_info=None).values()
    return result


def expected(converter: WeightConverter, lists: list[list[Tensor]]) -> Tensor:
    """By transformers itself."""
    found: Any = dict(zip(converter.source_patterns, lists, strict=True))
    for operation in converter.operations:
        found = operation.convert(found, converter.source_patterns, converter.target_patterns)
    (result,) = found.values()
    return result


@pytest.mark.parametrize(("rows", "converter"), [((3, 5), JOINED), ((4,), STACKED)], ids=["joined", "stacked"])
@pytest.mark.parametrize("rest", [(7,), ()], ids=["matrices", "biases"])
def test_experts_lie_where_transformers_puts_them(
    rows: tuple[int, ...], converter: WeightConverter, rest: tuple[int, ...], tmp_path: Path
) -> None:
    lists = [[torch.randn(count, *rest).to(torch.bfloat16) for _ in range(6)] for count in rows]
    lists[0][2] = torch.randn(rows[0], *rest)  # stored wider than the model is
    found = placed(converter, [[unread(tmp_path, one) for one in of_experts] for of_experts in lists])
    rounded = [[one.to(torch.bfloat16) for one in of_experts] for of_experts in lists]
    assert torch.equal(found, expected(converter, rounded))
    assert found.untyped_storage().nbytes() == found.nbytes


def test_tensors_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    alike = [unread(tmp_path, torch.zeros(2, 3)) for _ in range(3)]
    for other in (alike[:2], [unread(tmp_path, torch.zeros(2, 4)), *alike[:2]], [unread(tmp_path, torch.zeros(6))] * 3):
        with pytest.raises(
            SecateurError, match=r"model.experts.x: it is made of tensors of shapes 3 of \[\(2, 3\)\]; "
        ):
            placed(JOINED, [alike, other])


def test_only_chains_that_are_known_are_replaced() -> None:
    others = [
        WeightConverter("a", ["b", "c"], [Chunk(dim=0)]),
        WeightConverter(["a", "b"], "c", [Concatenate(dim=0)]),
        WeightConverter(["a", "b"], "c", [MergeModulelist(dim=1), Concatenate(dim=1)]),
    ]
    assert with_placing(others) == others
    assert [type(one) for one in with_placing([JOINED, STACKED])] == [PlacingConverter] * 2


def test_what_is_not_in_a_span_is_zero_and_its_bytes_are_not_read(tmp_path: Path) -> None:
    tensor = torch.arange(1.0, 13).view(4, 3)
    found = LazyTensor(tmp_path, "w", stored(tmp_path, tensor, "w"), [(0, 12), (24, 12)]).read()
    assert found.tolist() == [[1, 2, 3], [0, 0, 0], [7, 8, 9], [0, 0, 0]]
    missing = StoredTensor(file="no such file", dtype="F32", shape=(2,), start=0, length=8)
    assert LazyTensor(tmp_path, "w", missing, []).read().tolist() == [0, 0]


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "short")
    beyond = StoredTensor(file="short", dtype="F32", shape=(4,), start=10**4, length=16)
    with pytest.raises(SecateurError, match="short: it has become shorter while it was read"):
        LazyTensor(tmp_path, "a", beyond).read()
