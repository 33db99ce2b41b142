"""From a criterion and a `--keep` to a plan: counts are as asked, the best experts stay, super-experts always do."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.criteria import CRITERIA
from secateur.criteria.router_change import RouterChange
from secateur.criteria.weights import WeightStats
from secateur.decide.by_score import ALLOCATIONS, plan_by_criterion
from secateur.decide.keep import Keep
from secateur.decide.limits import LayerLimits
from secateur.decide.model_facts import Sizes
from secateur.errors import SecateurError
from secateur.plans import Plan
from secateur.stats import LayerStats, RouterStats
from support.toy_layer import layer_with_loads

GB = 10**9


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.75", Keep(share=0.75)),
        (".5", Keep(share=0.5)),
        ("1.0", Keep(share=1.0)),
        ("1", Keep(count=1)),
        (" 48 ", Keep(count=48)),
        ("24GB", Keep(num_bytes=24 * GB)),
        ("24 GB", Keep(num_bytes=24 * GB)),
        ("1.5GiB", Keep(num_bytes=3 * 2**29)),
        ("0.1KB", Keep(num_bytes=100)),
        ("700B", Keep(num_bytes=700)),
        ("2TiB", Keep(num_bytes=2**41)),
        ("0:48,7:40", Keep(layers={0: 48, 7: 40})),
    ],
)
def test_keep_is_read_from_text(text: str, keep: Keep) -> None:
    assert Keep.parse(text) == keep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found '', expected a share such as 0.75"),
        ("75%", "found '75%', expected a share"),
        ("24gb", "found '24gb', expected a share"),
        ("24iB", "found '24iB', expected a share"),
        ("-3", "found '-3', expected a share"),
        ("nan", "found 'nan', expected a share"),
        ("1e3", "found '1e3', expected a share"),
        ("0", "count is 0, expected an integer of 1 or more"),
        ("0.0", "the share is 0.0, expected more than 0 and at most 1"),
        ("1.5", "the share is 1.5, expected more than 0 and at most 1"),
        ("0.1B", "num_bytes is 0, expected an integer of 1 or more"),
        ("0:4,0:5", "lists a layer twice"),
        ("0:4,", "found '0:4,'"),
        ("0:0", "layer 0 is 0, expected an integer of 1 or more"),
    ],
)
def test_what_is_no_keep_is_refused(text: str, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Keep.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "found nothing, expected exactly one"),
        ({"share": 0.5, "count": 3}, "found share with count, expected exactly one"),
        ({"share": float("nan")}, "the share is nan"),
        ({"share": True}, "the share is True"),
        ({"count": 2.0}, "count is 2.0"),
        ({"layers": {}}, r"layers are \[\]"),
        ({"layers": {"0": 3}}, r"layers are \['0'\]"),
    ],
)
def test_exactly_one_number_in_range_is_asked_for(fields: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Keep(**fields)


def limits_of(*num_experts: int, **others: Any) -> dict[int, LayerLimits]:
    return {layer: LayerLimits(num_experts=count, **others) for layer, count in enumerate(num_experts)}


def counted(*loads: list[int]) -> RouterStats:
    return RouterStats.from_loads(dict(enumerate(loads)), 100)


def kept(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {layer: one.order for layer, one in plan.layers.items()}


def sizes_of(plan: Plan) -> list[int]:
    return [one.experts_after for one in plan.layers.values()]


@pytest.mark.parametrize(
    ("share", "experts", "count"),
    [
        (0.71, 100, 71),
        (0.9, 10, 9),
        (0.75, 8, 6),
        (0.5, 7, 4),
        (0.7, 8, 6),
        (1.0, 8, 8),
        (0.9, 8, 8),
        (0.3, 10, 3),
        (0.001, 8, 1),
    ],
)
def test_a_share_drops_the_floor_of_the_rest(share: float, experts: int, count: int) -> None:
    plan = plan_by_criterion("random", Keep(share=share), limits_of(experts))
    assert sizes_of(plan) == [count]


def test_the_highest_scores_stay_in_ascending_order_and_of_equal_scores_the_lower_id() -> None:
    stats = counted([5, 9, 5, 7, 5, 1])
    for count, expected in enumerate([(1,), (1, 3), (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)], start=1):
        plan = plan_by_criterion("frequency", Keep(count=count), limits_of(6), stats=stats)
        assert kept(plan) == {0: expected}


def test_every_router_group_loses_the_same_number() -> None:
    stats = counted([9, 8, 7, 6, 1, 2, 3, 4])
    plan = plan_by_criterion("frequency", Keep(count=4), limits_of(8, num_groups=2), stats=stats)
    assert kept(plan) == {0: (0, 1, 6, 7)}
    plan = plan_by_criterion("frequency", Keep(count=4), limits_of(8), stats=stats)
    assert kept(plan) == {0: (0, 1, 2, 3)}


def test_a_share_is_rounded_up_for_groups_and_a_count_is_not_rounded() -> None:
    limits, stats = limits_of(8, num_groups=4), counted([1] * 8)
    assert sizes_of(plan_by_criterion("frequency", Keep(share=0.6), limits, stats=stats)) == [8]
    assert sizes_of(plan_by_criterion("frequency", Keep(share=0.5), limits, stats=stats)) == [4]
    with pytest.raises(SecateurError, match=r"keep: 5 of 8 experts in layer 0, expected one of \[4, 8\].*num_groups=4"):
        plan_by_criterion("frequency", Keep(count=5), limits, stats=stats)
    with pytest.raises(SecateurError, match="keep: 6 of 8 experts in layer 0"):
        plan_by_criterion("frequency", Keep(layers={0: 6}), limits, stats=stats)


@pytest.mark.parametrize("keep", [Keep(count=1), Keep(share=0.1), Keep(layers={0: 1})])
def test_fewer_than_the_router_needs_is_an_error(keep: Keep) -> None:
    with pytest.raises(
        SecateurError, match=r"keep: 1 of 8 experts in layer 0, expected one of \[2, 3, .*min_experts=2"
    ):
        plan_by_criterion("random", keep, limits_of(8, min_experts=2))


def test_layers_keep_what_is_asked_of_each() -> None:
    stats = counted([1, 2, 3, 4], [4, 3, 2, 1])
    plan = plan_by_criterion("frequency", Keep.parse("0:1,1:3"), limits_of(4, 4), stats=stats)
    assert kept(plan) == {0: (3,), 1: (0, 1, 2)}
    with pytest.raises(SecateurError, match=r"keep: found layers \[0, 2\], expected \[0, 1\]"):
        plan_by_criterion("frequency", Keep.parse("0:1,2:3"), limits_of(4, 4), stats=stats)
    with pytest.raises(SecateurError, match="keep: 5 experts in layer 1, which has only 4"):
        plan_by_criterion("frequency", Keep.parse("0:1,1:5"), limits_of(4, 4), stats=stats)


def test_bytes_keep_the_largest_uniform_model_that_fits() -> None:
    sizes = Sizes(total_bytes=1000, bytes_per_expert={0: 50, 1: 30})  # 8 + 8 experts are 640 of the 1000
    for budget, count in [(1000, 8), (2000, 8), (999, 7), (920, 7), (919, 6), (840, 6), (440, 1)]:
        plan = plan_by_criterion("random", Keep(num_bytes=budget), limits_of(8, 8), sizes=sizes)
        assert sizes_of(plan) == [count, count], budget
    with pytest.raises(
        SecateurError, match=r"561 bytes must go, but at most 560 can: .*at least \{0: 1, 1: 1\} experts"
    ):
        plan_by_criterion("random", Keep(num_bytes=439), limits_of(8, 8), sizes=sizes)


def test_bytes_keep_one_share_of_layers_of_different_sizes() -> None:
    sizes = Sizes(total_bytes=12, bytes_per_expert={0: 1, 1: 1})
    plans = [plan_by_criterion("random", Keep(num_bytes=n), limits_of(8, 4), sizes=sizes) for n in (12, 11, 10, 9, 6)]
    assert [sizes_of(plan) for plan in plans] == [[8, 4], [7, 4], [6, 3], [6, 3], [4, 2]]


@pytest.mark.parametrize("sizes", [None, Sizes(total_bytes=10, bytes_per_expert={0: 1})])
def test_bytes_need_the_sizes_of_every_layer(sizes: Sizes | None) -> None:
    with pytest.raises(SecateurError, match="bytes were asked for, but the sizes"):
        plan_by_criterion("random", Keep(num_bytes=5), limits_of(8, 8), sizes=sizes)


def test_a_global_allocation_drops_the_smallest_shares_of_score() -> None:
    # shares: layer 0 has 1, 2, 3, 14 of 20, layer 1 the same 5 each of 20; scores of layer 1 are 10 times as large
    stats = counted([1, 2, 3, 14], [50, 50, 50, 50])
    plan = plan_by_criterion("frequency", Keep(share=0.5), limits_of(4, 4), stats=stats, allocation="global")
    assert kept(plan) == {0: (3,), 1: (0, 1, 2)}  # 1 + 2 + 3 + 5 of 20
    plan = plan_by_criterion("frequency", Keep(count=3), limits_of(4, 4), stats=stats, allocation="global")
    assert kept(plan) == {0: (2, 3), 1: (0, 1, 2, 3)}


def test_a_global_allocation_is_the_best_there_is() -> None:
    rng = random.Random(0)
    for _ in range(10):
        loads = [[rng.randrange(1, 50) for _ in range(4)] for _ in range(3)]
        sizes = Sizes(total_bytes=300, bytes_per_expert={layer: rng.choice([3, 5, 8]) for layer in range(3)})
        saving = rng.randrange(5, 30)
        shares = [sorted(load / sum(layer) for load in layer) for layer in loads]
        best = min(
            sum(sum(shares[layer][:gone]) for layer, gone in enumerate(drops))
            for drops in itertools.product(range(4), repeat=3)
            if sum(gone * sizes.bytes_per_expert[layer] for layer, gone in enumerate(drops)) >= saving
        )
        plan = plan_by_criterion(
            "frequency",
            Keep(num_bytes=300 - saving),
            limits_of(4, 4, 4),
            stats=counted(*loads),
            sizes=sizes,
            allocation="global",
        )
        cost = sum(loads[layer][old] / sum(loads[layer]) for layer, one in plan.layers.items() for old in one.dropped)
        assert sum(len(one.dropped) * sizes.bytes_per_expert[layer] for layer, one in plan.layers.items()) >= saving
        assert cost == pytest.approx(best, abs=1e-9)


def test_a_laep_allocation_drops_while_the_cumulative_load_is_small() -> None:
    # cumulative loads in hundredths: layer 0: 1, 3, 6, 100; layer 1: 2, 10, 40, 100
    stats = counted([94, 1, 2, 3], [2, 8, 30, 60])
    for share, expected in [
        (1.0, [4, 4]), (0.875, [3, 4]), (0.75, [3, 3]), (0.625, [2, 3]), (0.5, [1, 3]), (0.375, [1, 2]), (0.25, [1, 1])
    ]:  # fmt: skip
        plan = plan_by_criterion("frequency", Keep(share=share), limits_of(4, 4), stats=stats, allocation="laep")
        assert sizes_of(plan) == expected, share


def test_a_laep_allocation_decides_how_many_and_the_criterion_which() -> None:
    stats = counted([94, 1, 2, 3], [25, 25, 25, 25])
    tensor = torch.tensor([[1.0], [5.0], [4.0], [3.0]])
    weights = dict.fromkeys((0, 1), WeightStats.of_experts("w", tensor))
    plan = plan_by_criterion(
        "weight_norm", Keep(share=0.75), limits_of(4, 4), stats=stats, weights=weights, allocation="laep"
    )
    assert kept(plan) == {0: (1, 2), 1: (0, 1, 2, 3)}


def test_of_layers_with_equal_cumulative_load_the_lower_keeps_more() -> None:
    stats = counted([1, 0, 0, 3], [1, 0, 0, 3])
    plan = plan_by_criterion("frequency", Keep(share=0.875), limits_of(4, 4), stats=stats, allocation="laep")
    assert sizes_of(plan) == [4, 3]


@pytest.mark.parametrize("allocation", ["global", "laep"])
def test_allocations_drop_no_more_experts_than_asked(allocation: str) -> None:
    for groups, share, dropped in [(1, 0.71, 6), (2, 0.71, 6), (4, 0.71, 4), (4, 0.9, 0), (2, 0.9, 2)]:
        limits, stats = limits_of(8, 8, 8, num_groups=groups), counted([1] * 8, [2] * 8, [3] * 8)
        plan = plan_by_criterion("frequency", Keep(share=share), limits, stats=stats, allocation=allocation)
        assert sum(sizes_of(plan)) == 24 - dropped, (groups, share)


@pytest.mark.parametrize("allocation", ["global", "laep"])
def test_allocations_keep_floors_and_groups(allocation: str) -> None:
    stats = counted([0, 0, 0, 100, 0, 0, 0, 100], [25] * 8)
    limits = limits_of(8, 8, num_groups=2, min_experts=4)
    plan = plan_by_criterion("frequency", Keep(share=0.75), limits, stats=stats, allocation=allocation)
    assert kept(plan) == {0: (0, 3, 4, 7), 1: tuple(range(8))}
    with pytest.raises(SecateurError, match="keep: 12 experts must go, but at most 8 can"):
        plan_by_criterion("frequency", Keep(share=0.25), limits, stats=stats, allocation=allocation)
    with pytest.raises(SecateurError, match="leaves nothing to allocate"):
        plan_by_criterion("frequency", Keep(layers={0: 4, 1: 4}), limits, stats=stats, allocation=allocation)


def test_what_an_allocation_cannot_use_is_refused() -> None:
    weights = {0: WeightStats.of_experts("w", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))}
    with pytest.raises(SecateurError, match=r"layer 0: a score is -.*below 0 have no shares"):
        plan_by_criterion("aimer", Keep(count=1), limits_of(2), weights=weights, allocation="global")
    with pytest.raises(SecateurError, match="allocation 'laep' needs token_count"):
        plan_by_criterion("random", Keep(count=1), limits_of(2), allocation="laep")
    with pytest.raises(SecateurError, match="layer 1: no token was routed"):
        plan_by_criterion("random", Keep(count=1), limits_of(2, 2), stats=counted([1, 1], [0, 0]), allocation="laep")
    with pytest.raises(SecateurError, match="allocation is 'best', expected one of uniform, global, laep"):
        plan_by_criterion("random", Keep(count=1), limits_of(2), allocation="best")


def with_outlier(layer: int = 0, expert: int = 5) -> RouterStats:
    """Four layers of eight experts with ascending loads from 1; one expert, otherwise first to go, is an outlier."""
    layers = {}
    for number in range(4):
        count = torch.arange(2, 10)
        largest = torch.ones(8, dtype=torch.float64)
        if number == layer:
            count[expert], largest[expert] = 1, 50
        layers[number] = LayerStats(num_tokens=50, token_count=count, max_activation=largest)
    return RouterStats(layers=layers)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_super_expert_stays_whatever_its_score_and_the_plan_says_so(allocation: str) -> None:
    limits, stats = limits_of(8, 8, 8, 8), with_outlier()
    given: dict[str, Any] = {"stats": stats, "allocation": allocation}
    plan = plan_by_criterion("frequency", Keep(share=0.5), limits, **given)
    assert 5 in plan.layers[0].order
    assert plan.details["super_experts"] == {"protected": {"0": [5]}, "rescued": {"0": [5]}}
    off = plan_by_criterion("frequency", Keep(share=0.5), limits, protect=False, **given)
    assert 5 not in off.layers[0].order
    assert off.details["super_experts"] is None
    assert sum(sizes_of(off)) == sum(sizes_of(plan)) == 16, "protection exceeded the budget"


def test_a_super_expert_that_was_not_in_danger_is_not_called_rescued() -> None:
    stats = with_outlier(expert=0)
    plan = plan_by_criterion("random", Keep(share=1.0), limits_of(8, 8, 8, 8), stats=stats)
    assert plan.details["super_experts"] == {"protected": {"0": [0]}, "rescued": {}}


def test_protection_reaches_criteria_without_data_but_needs_maxima_only_where_asked_for() -> None:
    limits = limits_of(8, 8, 8, 8)
    for seed in range(20):
        plan = plan_by_criterion("random", Keep(count=1), limits, stats=with_outlier(), seed=seed)
        assert plan.layers[0].order == (5,)
    without = RouterStats.from_loads(with_outlier().loads(), 50)
    assert plan_by_criterion("random", Keep(count=1), limits, stats=without).details["super_experts"] is None
    for stats in (None, without):
        with pytest.raises(SecateurError, match="super-experts are found by max_activation"):
            plan_by_criterion("random", Keep(count=1), limits, stats=stats, protect=True)


def test_protection_never_exceeds_the_budget_silently() -> None:
    large = torch.ones(1000, dtype=torch.float64)
    large[:3] = 100
    counts = torch.ones(1000, dtype=torch.int64)
    stats = RouterStats(
        layers={
            layer: LayerStats(num_tokens=1, token_count=counts, max_activation=large if layer == 0 else large * 0 + 1)
            for layer in range(2)
        }
    )
    limits = limits_of(1000, 1000)
    assert plan_by_criterion("frequency", Keep(count=3), limits, stats=stats).layers[0].order == (0, 1, 2)
    with pytest.raises(
        SecateurError, match=r"keep: 2 of 1000 experts in layer 0.*super-experts \[0, 1, 2\] are protec"
    ):
        plan_by_criterion("frequency", Keep(count=2), limits, stats=stats)
    with pytest.raises(SecateurError, match=r"must go, but at most .* can: .*layer 0, super-experts \[0, 1, 2\]"):
        plan_by_criterion("frequency", Keep(share=0.001), limits, stats=stats, allocation="global")
    with pytest.raises(SecateurError, match=r"max_experts is 2, too few to protect super-experts \[0, 1, 2\]"):
        plan_by_criterion("frequency", Keep(count=2), limits_of(1000, 1000, max_experts=2), stats=stats)


def test_groups_leave_room_for_the_group_with_most_super_experts() -> None:
    large = torch.ones(1000, dtype=torch.float64)
    large[[0, 1, 999]] = 100
    one = LayerStats(num_tokens=1, token_count=torch.ones(1000, dtype=torch.int64), max_activation=large)
    stats = RouterStats(
        layers={0: one, 1: LayerStats(num_tokens=1, token_count=one.token_count, max_activation=large * 0)}
    )
    limits = limits_of(1000, 1000, num_groups=2)
    plan = plan_by_criterion("frequency", Keep(count=4), limits, stats=stats)
    assert plan.layers[0].order == (0, 1, 500, 999)
    with pytest.raises(SecateurError, match=r"keep: 2 of 1000 experts in layer 0, expected one of \[4, "):
        plan_by_criterion("frequency", Keep(count=2), limits, stats=stats)


def test_a_plan_says_how_it_was_made_and_reads_back_equal(tmp_path: Path) -> None:
    stats = counted([0, 5, 5, 5], [1, 5, 5, 5])
    weights = {layer: WeightStats.of_experts("w", torch.tensor([[1.0], [2.0], [0.0], [4.0]])) for layer in (0, 1)}
    plan = plan_by_criterion("random", Keep(layers={0: 2, 1: 3}), limits_of(4, 4), stats=stats, weights=weights, seed=7)
    assert plan.criterion == "random"
    assert plan.stats_digest == stats.digest()
    assert plan.details == {
        "source": "control",
        "keep": {"layers": {"0": 2, "1": 3}},
        "allocation": "uniform",
        "seed": 7,
        "super_experts": None,
        "never_routed": {"0": [0]},
        "zero_weights": {"0": [2], "1": [2]},
    }
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    other = plan_by_criterion("frequency", Keep(share=0.5), limits_of(4, 4), stats=stats, seed=7)
    assert other.details["seed"] is None
    assert other.details["keep"] == {"share": 0.5}
    assert plan_by_criterion("random", Keep(count=2), limits_of(4)).stats_digest is None


def test_random_plans_depend_on_the_seed_and_every_expert_has_its_turn() -> None:
    plans = [plan_by_criterion("random", Keep(count=2), limits_of(4, 4), seed=seed) for seed in range(30)]
    again = plan_by_criterion("random", Keep(count=2), limits_of(4, 4), seed=3)
    assert kept(again) == kept(plans[3])
    for layer in (0, 1):
        assert {old for plan in plans for old in plan.layers[layer].order} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_makes_a_plan_that_permuting_the_experts_permutes(name: str) -> None:
    if name == "random":
        return
    rng = torch.Generator().manual_seed(0)
    numbers = torch.rand(6, generator=rng, dtype=torch.float64) + 0.5
    tensor = torch.rand(6, 9, generator=rng, dtype=torch.float64)
    order = [4, 2, 0, 5, 1, 3]
    found = []
    for ids in (list(range(6)), order):
        stats = layer_with_loads([3, 9, 4, 7, 1, 6]).stats().reordered(ids)
        weights: WeightStats | RouterChange
        weights = WeightStats.of_experts("w", tensor[ids]) + WeightStats.of_router("r", tensor[ids])
        if CRITERIA[name].needs == "router change":
            weights = RouterChange.of_rows("r", tensor[ids].flip(1) * numbers[ids, None], tensor[ids])
        plan = plan_by_criterion(
            name, Keep(count=3), limits_of(6), stats=RouterStats(layers={0: stats}), weights={0: weights}
        )
        found.append({ids[expert] for expert in plan.layers[0].order})
    assert found[0] == found[1]
