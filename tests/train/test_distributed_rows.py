"""Rows of a sharded tensor: where they lie, as torch says it too, and that each comes to the rank that will hold it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from secateur.train.distributed.rows import RowLayout, layout_of, take_rows
from support.distributed_runs import Scenarios, refusal

# One process: layouts

layouts = st.lists(st.integers(1, 4), min_size=1, max_size=3).flatmap(
    lambda shape: st.builds(
        lambda cuts: RowLayout(mesh_shape=tuple(shape), cuts=tuple(cuts)),
        st.lists(st.sampled_from(range(len(shape))), unique=True),
    )
)


@given(layout=layouts, num_rows=st.integers(0, 40))
def test_every_row_is_held_exactly_once_among_the_partners_of_every_rank(layout: RowLayout, num_rows: int) -> None:
    ranges = layout.ranges(num_rows)
    assert len(ranges) == math.prod(layout.mesh_shape)
    for rank in range(len(ranges)):
        partners = layout.partners(rank)
        assert rank in partners
        assert sorted(row for partner in partners for row in ranges[partner]) == list(range(num_rows))


@given(layout=layouts, num_rows=st.integers(0, 40))
def test_ranks_that_differ_in_no_cut_hold_the_same_rows(layout: RowLayout, num_rows: int) -> None:
    held: dict[tuple[int, ...], range] = {}
    for coordinate, rows in zip(layout.coordinates(), layout.ranges(num_rows), strict=True):
        part = tuple(coordinate[dim] for dim in layout.cuts)
        assert list(held.setdefault(part, rows)) == list(rows)


@given(num_rows=st.integers(0, 40), ranks=st.integers(1, 6))
def test_one_cut_is_that_of_torch_chunk(num_rows: int, ranks: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(num_rows).chunk(ranks)] if num_rows else []
    chunks += [[]] * (ranks - len(chunks))
    assert [list(rows) for rows in RowLayout(mesh_shape=(ranks,), cuts=(0,)).ranges(num_rows)] == chunks


def test_a_strided_cut_comes_after_the_plain_one() -> None:
    layout = RowLayout(mesh_shape=(2, 3), cuts=(1, 0))  # 3 expert-parallel ranks cut first, each pair shares the rest
    assert [list(rows) for rows in layout.ranges(9)] == [[0, 1], [3, 4], [6, 7], [2], [5], [8]]
    assert layout.partners(4) == [0, 1, 2, 3, 4, 5]


def test_copies_take_rows_from_the_ranks_of_their_own_copy() -> None:
    layout = RowLayout(mesh_shape=(2, 2), cuts=(1,))
    assert [layout.partners(rank) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


# Four ranks

FOUR = Scenarios(__name__, 4)
FSDP, HSDP, BOTH = (4,), (2, 2), (2, 2)
# mesh, placements: of a plain FSDP2 model, of two replicas, of other axes, and of two cuts of the same axis
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp": ((4,), (Shard(0),)),
    "copies": ((4,), (Replicate(),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "hsdp, mesh turned": ((2, 2), (Shard(0), Replicate())),
    "fsdp, tp on columns": ((2, 2), (Shard(0), Shard(1))),
    "tp on columns alone": ((4,), (Shard(1),)),
    "two cuts": ((2, 2), (Shard(0), Shard(0))),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


class Experts(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def of_numbered_rows(num_rows: int, width: int = 4) -> Tensor:
    return torch.arange(num_rows, dtype=torch.float32)[:, None].expand(-1, width).contiguous()


def under_fsdp_and_ep(num_rows: int, efsdp: int, ep: int) -> Any:
    """As transformers splits experts: first over the ep mesh, then FSDP2 over efsdp."""
    meshes = init_device_mesh("cpu", (efsdp, ep), mesh_dim_names=("efsdp", "ep"))
    module = Experts(distribute_tensor(of_numbered_rows(num_rows), meshes["ep"], [Shard(0)], src_data_rank=None))
    return fully_shard(module, mesh=meshes["efsdp"]).weight


def placed(name: str, value: Tensor) -> DTensor:
    shape, placements = PLACEMENTS[name]
    return distribute_tensor(value, init_device_mesh("cpu", shape), placements, src_data_rank=None)


def computed_and_held(tensor: DTensor) -> list[list[float]]:
    return [
        [float(row) for row in layout_of(tensor, "t").ranges(tensor.shape[0])[dist.get_rank()]],
        tensor.to_local()[:, 0].tolist(),
    ]


@FOUR.scenario
def ranges_of_all_placements() -> Any:
    found = {}
    for num_rows in (0, 1, 3, 4, 7, 8, 12):
        for name in PLACEMENTS:
            found[f"{name}, {num_rows} rows"] = computed_and_held(placed(name, of_numbered_rows(num_rows)))
    for efsdp, ep in ((2, 2), (1, 4), (4, 1)):
        for num_rows in (4, 8, 12, 20):
            found[f"efsdp {efsdp}, ep {ep}, {num_rows} rows"] = computed_and_held(
                under_fsdp_and_ep(num_rows, efsdp, ep)
            )
    return found


def is_taken(tensor: DTensor, whole: Tensor, order: list[int]) -> bool:
    """Whether the rows that arrive are those of the new tensor, cut as torch cuts it."""
    index = torch.tensor(order, dtype=torch.int64)
    got = take_rows(tensor, "t", index)
    expected = whole.index_select(0, index)
    rows = layout_of(tensor, "t").ranges(len(order))[dist.get_rank()]
    expected = expected[rows.start : rows.stop]
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard) and placement.dim == 1:
            expected = expected.chunk(tensor.device_mesh.size(dim), 1)[tensor.device_mesh.get_local_rank(dim)]
    return torch.equal(got, expected) and got.dtype == whole.dtype and got.is_contiguous()


ORDERS = {
    "as it is": list(range(8)),
    "turned round": list(range(8))[::-1],
    "fewer": [6, 1, 3],
    "one": [5],
    "none": [],
    "more, repeated": [7, 0, 0, 7, 7, 2, 1, 6, 5, 4, 3, 3],
}


@FOUR.scenario
def rows_of_all_placements() -> Any:
    found = {}
    whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for order_name, order in ORDERS.items():
        for name in PLACEMENTS:
            found[f"{name}, {order_name}"] = is_taken(placed(name, whole), whole, order)
        for efsdp, ep in ((2, 2), (1, 4)):
            tensor = under_fsdp_and_ep(8, efsdp, ep)
            found[f"efsdp {efsdp}, ep {ep}, {order_name}"] = is_taken(tensor, of_numbered_rows(8), order)
    for dtype in DTYPES:
        value = (100 * whole).to(dtype)
        found[str(dtype)] = is_taken(placed("fsdp", value), value, [6, 1, 3, 3])
    for num_rows in (1, 3, 7):
        value = of_numbered_rows(num_rows)
        found[f"{num_rows} rows over 4 ranks"] = is_taken(placed("fsdp", value), value, list(range(num_rows))[::-1] * 2)
    return found


@FOUR.scenario
def the_mesh_of_two_of_four_ranks() -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    value = of_numbered_rows(8)
    return {dim: float(take_one(distribute_tensor(value, mesh[dim], [Shard(0)], src_data_rank=None))) for dim in "ab"}


def take_one(tensor: DTensor) -> Tensor:
    return take_rows(tensor, "t", torch.tensor([7, 0]))[0, 0]


@FOUR.scenario
def ranks_the_other_way_round() -> Any:
    value = of_numbered_rows(8)
    tensor = distribute_tensor(value, DeviceMesh("cpu", [3, 2, 1, 0]), [Shard(0)], src_data_rank=None)
    return refusal(lambda: take_one(tensor))


@FOUR.scenario
def placements_that_are_refused() -> Any:
    mesh = init_device_mesh("cpu", (2, 2))
    local = torch.zeros(4, 2)
    strided = _StridedShard(0, split_factor=2)
    cases = {
        "partial": (Partial(), Shard(0)),
        "two strided": (strided, strided),
        "strided, nothing cut before": (strided, Replicate()),
    }
    return {
        name: refusal(lambda placements=placements: layout_of(DTensor.from_local(local, mesh, placements), "gate"))
        for name, placements in cases.items()
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return FOUR.play(tmp_path_factory.mktemp("rows"))


@pytest.mark.torchrun
@pytest.mark.slow
def test_the_computed_rows_are_those_that_torch_gives_each_rank(four: Any) -> None:
    results = four["ranges_of_all_placements"]
    for result in results:
        assert {name: computed for name, (computed, _) in result.items()} == {
            name: held for name, (_, held) in result.items()
        }
    held = [result["efsdp 2, ep 2, 12 rows"][1] for result in results]
    assert held == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]]


@pytest.mark.torchrun
@pytest.mark.slow
def test_each_rank_gets_its_rows_of_the_new_order(four: Any) -> None:
    for result in four["rows_of_all_placements"]:
        assert [name for name, is_right in result.items() if not is_right] == []


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_mesh_of_some_ranks_exchanges_among_those(four: Any) -> None:
    results = four["the_mesh_of_two_of_four_ranks"]
    assert [result["a"] for result in results] == [7, 7, 0, 0]
    assert [result["b"] for result in results] == [7, 0, 7, 0]


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_mesh_in_another_order_than_its_group_is_refused(four: Any) -> None:
    for message in four["ranks_the_other_way_round"]:
        assert message.startswith("t: the mesh ")
        assert message.endswith("orders its ranks otherwise than its process group")


@pytest.mark.torchrun
@pytest.mark.slow
def test_other_placements_are_refused(four: Any) -> None:
    for result in four["placements_that_are_refused"]:
        assert result["partial"].startswith("gate: placements")
        assert "expected sharded or replicated" in result["partial"]
        assert "at most one strided one" in result["two strided"]
        assert "at most one strided one" in result["strided, nothing cut before"]
