"""The released model on paper: the list, the parameters that go, and an estimate that can be done by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from secateur.plans import LayerPlan, Plan


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import laep_scale
    finally:
        sys.path.pop(0)
    return laep_scale


def test_the_released_list_has_103_layers_and_4360_experts(scale: ModuleType) -> None:
    counts = scale.RETAINED
    assert (len(counts), sum(counts)) == (103, 4360)
    assert all(count % 8 == 0 for count in counts)
    ends = [40, 48, 24, 16, 24, 16, 16, 24, 32, 32], [32, 32, 32, 32, 32, 32, 24, 24, 16, 8]
    assert (list(counts[:10]), list(counts[93:])) == ends


def test_the_plan_removes_505_541_357_568_parameters(scale: ModuleType) -> None:
    layers = scale.decide()
    plan = Plan(layers={number: layer.plan for number, layer in enumerate(layers)}, criterion="released model")
    assert scale.EXPERT_PARAMETERS == 226_497_024
    assert scale.parameters_removed(plan) == 505_541_357_568
    for layer in layers:
        assert layer.balance_after <= layer.balance_before
        homes = [old // 8 for old in layer.plan.order]
        ranks = [new // (layer.kept // 8) for new in range(layer.kept)]
        moves = [(home, rank) for home, rank in zip(homes, ranks, strict=True) if home != rank]
        assert layer.sent == tuple(sum(home == rank for home, _ in moves) for rank in range(8))
        assert layer.received == tuple(sum(new == rank for _, new in moves) for rank in range(8))


def test_the_estimate_by_hand(scale: ModuleType) -> None:
    layer = scale.Layer(
        plan=LayerPlan(experts_before=64, order=tuple(range(16))),
        balance_before=1.5,
        balance_after=1.1,
        over_bound=1.0,
        received=(0, 2, 2, 2, 2, 2, 2, 2),
        sent=(6, 8, 0, 0, 0, 0, 0, 0),
        kept=16,
    )
    expert = 226_497_024 * 14
    costs = scale.estimate([layer, layer], gather=1e9, bandwidth=2e9, bytes_each=14)
    assert costs["surgery_bytes"] == 32 * expert
    assert costs["surgery_seconds"] == pytest.approx(2 * expert / 1e9)
    assert (costs["experts_moved"], costs["experts_moved_rank"]) == (28, 8)
    assert costs["moved_bytes"] == 28 * expert
    assert costs["rearrangement_seconds"] == pytest.approx(8 * expert / 1e9 + 8 * expert / 2e9)
