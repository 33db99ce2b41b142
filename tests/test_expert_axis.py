from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertAxis, ExpertTensor, gather, row_index
from secateur.modeling_secateur import LinearInCount
from secateur.plans import LayerPlan, Neurons, Source


def tensor_of(dim: int, rows_per_expert: int = 1, num_trailing: int = 0) -> ExpertTensor:
    return ExpertTensor(name="w", axis=ExpertAxis(dim=dim, rows_per_expert=rows_per_expert, num_trailing=num_trailing))


def taking(order: list[int], num_experts: int) -> LayerPlan:
    return LayerPlan(experts_before=num_experts, order=tuple(order))


def test_the_rows_of_an_axis_are_those_of_each_new_expert_and_then_the_trailing_ones() -> None:
    packed = ExpertAxis(dim=1, rows_per_expert=3, num_trailing=2)
    assert packed.rows([2, 0], 4) == [range(6, 9), range(3), range(12, 14)]
    assert ExpertAxis(dim=0).rows((3, 1), 4) == [range(3, 4), range(1, 2)]
    assert (packed.size(4), packed.resized((7, 14, 5), 2)) == (14, (7, 8, 5))


def test_the_copied_file_and_the_library_mean_the_same_by_the_three_numbers_of_an_axis() -> None:
    for numbers in itertools.product((0, 1, 2), (1, 2, 5), (0, 1, 7)):
        fields = dict(zip(("dim", "rows_per_expert", "num_trailing"), numbers, strict=True))
        axis, copied = ExpertAxis(**fields), LinearInCount(**fields)
        assert dataclasses.asdict(axis) == dataclasses.asdict(copied) == fields
        for num_experts in (1, 2, 8, 33):
            assert axis.size(num_experts) == copied.size(num_experts)
            assert axis.size(num_experts) == sum(map(len, axis.rows(range(num_experts), num_experts)))


def test_row_index_of_a_packed_axis_with_trailing_rows_is_the_one_computed_by_hand() -> None:
    packed = tensor_of(dim=0, rows_per_expert=3, num_trailing=2)
    assert row_index(taking([2, 0], 4), packed).tolist() == [6, 7, 8, 0, 1, 2, 12, 13]
    assert row_index(taking([2, 0], 4), packed).dtype == torch.int64
    assert row_index(taking([1], 2), tensor_of(dim=5)).tolist() == [1]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_takes_whole_experts_on_the_named_axis_only(dim: int) -> None:
    tensor = torch.randn(4, 4, 4)  # every axis has the size of the expert axis: shapes cannot be the guide
    slices = list(tensor.unbind(dim))
    gathered = gather(tensor, tensor_of(dim=dim), taking([3, 0, 2], 4))
    assert torch.equal(gathered, torch.stack([slices[3], slices[0], slices[2]], dim))


def test_gather_of_a_flattened_axis_equals_gather_of_the_same_tensor_unflattened() -> None:
    stacked = torch.randn(2, 5, 3, 4)  # (D, E, r, F)
    flat = tensor_of(dim=1, rows_per_expert=3)
    expected = stacked[:, [4, 1]].reshape(2, 6, 4)
    assert torch.equal(gather(stacked.reshape(2, 15, 4), flat, taking([4, 1], 5)), expected)


def test_trailing_rows_stay_at_the_end_under_any_order() -> None:
    tensor = torch.arange(7)
    spec = tensor_of(dim=0, num_trailing=3)
    assert gather(tensor, spec, taking([3, 1], 4)).tolist() == [3, 1, 4, 5, 6]
    assert gather(tensor, spec, taking([0, 1, 2, 3], 4)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_two_gathers_equal_one_gather_by_the_composed_order() -> None:
    tensor = torch.randn(6 * 2 + 1, 3)
    spec = tensor_of(dim=0, rows_per_expert=2, num_trailing=1)
    first, second = [5, 0, 3, 2], [2, 0, 3]
    twice = gather(gather(tensor, spec, taking(first, 6)), spec, taking(second, 4))
    assert torch.equal(twice, gather(tensor, spec, taking([first[i] for i in second], 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_gather_keeps_the_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 1], [1, 0]]).to(dtype)
    gathered = gather(tensor, tensor_of(dim=0), taking([2, 0], 3))
    assert gathered.dtype == dtype
    assert gathered.tolist() == [tensor[2].tolist(), tensor[0].tolist()]


def test_gather_keeps_the_device() -> None:
    gathered = gather(torch.empty(4, 2, device="meta"), tensor_of(dim=0), taking([1], 4))
    assert gathered.device.type == "meta"
    assert gathered.shape == (1, 2)


def test_gather_returns_contiguous_storage_of_its_own_outside_autograd() -> None:
    parameter = nn.Parameter(torch.randn(3, 4).T)  # not contiguous, experts (4) on axis 0
    gathered = gather(parameter, tensor_of(dim=0), taking([0, 1, 2, 3], 4))
    assert gathered.is_contiguous()
    assert not gathered.requires_grad
    before = parameter.detach().clone()
    gathered.add_(1)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((5, 2), tensor_of(dim=0), r"w: axis 0 of shape \(5, 2\) has 5 entries, expected 4"),
        ((4, 2), tensor_of(dim=1), r"w: axis 1 of shape \(4, 2\) has 2 entries, expected 4"),
        ((8, 2), tensor_of(dim=0, rows_per_expert=2, num_trailing=1), r"has 8 entries, expected 9"),
        ((4, 2), tensor_of(dim=2), r"w: shape \(4, 2\) has no axis 2, expected one of 4"),
    ],
)
def test_an_axis_of_another_size_is_refused(shape: tuple[int, ...], spec: ExpertTensor, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        gather(torch.zeros(shape), spec, taking([0], 4))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([], "order is empty"),
        ([0, 4], r"names expert 4, expected 0\.\.3"),  # would silently take a trailing row
        ([-1], r"names expert -1, expected 0\.\.3"),
        ([1.5], r"names expert 1\.5"),
        ([1, 2, 1], r"names experts \[1\] more than once"),
    ],
)
def test_an_order_that_is_no_choice_of_experts_is_refused(order: list[int], message: str) -> None:
    with pytest.raises(SecateurError, match=f"^w: .*{message}"):
        row_index(taking(order, 4), tensor_of(dim=0, num_trailing=4))


@pytest.mark.parametrize("source", [Source(expert=0, weight=0.5), Source(expert=0, neurons=Neurons([1]))])
def test_experts_that_are_more_than_a_copy_are_never_taken_for_one(source: Source) -> None:
    entry = (source, Source(expert=1, weight=0.5)) if source.neurons is None else (source,)
    mixed = LayerPlan(experts_before=2, order=(0,), sources={0: entry}, width_before=2)
    with pytest.raises(SecateurError, match=r"^w: the plan mixes or thins experts"):
        gather(torch.zeros(2, 3), tensor_of(dim=0), mixed)


@pytest.mark.parametrize(("field", "value"), [("dim", -1), ("rows_per_expert", 0), ("num_trailing", -1)])
def test_a_layout_that_cannot_exist_is_refused(field: str, value: int) -> None:
    with pytest.raises(SecateurError, match=f"^{field} is {value}"):
        ExpertAxis(**{"dim": 0, field: value})
