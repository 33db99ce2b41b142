"""Allocation keeps what the rule says, within the limits; the goals are solved as well as trying everything would."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import pytest

from secateur.decide import by_load
from secateur.decide.by_load import Allocation, Problem
from secateur.decide.knapsack import cheapest_saving, largest_saving, saving_unit
from secateur.decide.laep_rule import laep_removable
from secateur.decide.limits import LayerLimits
from secateur.decide.rule import Rule, decide
from secateur.errors import SecateurError
from secateur.plans import Plan
from secateur.stats import RouterStats

SPEC_LOADS = [5, 40, 10, 300, 20, 80, 35, 510]
SPEC_TABLE = [
    (0.2, 0.1, [0, 2, 4], [0, 2], []),
    (0.4, 0.1, [0, 2, 4, 6], [0, 2, 4, 6], [0, 2, 4, 6]),
    (math.inf, 0.05, [0, 2, 4], [0, 2], []),
    (math.inf, 0.1, [0, 2, 4, 6], [0, 2, 4, 6], [0, 2, 4, 6]),
    (math.inf, 0.2, [0, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6], [0, 2, 4, 6]),
    (0.4, 1, [0, 1, 2, 4, 6], [0, 2, 4, 6], [0, 2, 4, 6]),
]


def of_problem(rule: Callable[..., Allocation]) -> Callable[..., Allocation]:
    """The function of a rule, taking the parts of its problem."""

    def decide(
        loads: Mapping[int, list[int]],
        limits: Mapping[int, LayerLimits],
        *,
        params_per_expert: Mapping[int, int] | None = None,
        total_params: int = 0,
        uniform: bool = False,
        **options: float,
    ) -> Allocation:
        sizes = params_per_expert or {}
        problem = Problem(
            loads=loads, limits=limits, params_per_expert=sizes, total_params=total_params, uniform=uniform
        )
        return rule(problem, **options)

    return decide


laep, target_params, max_rerouted = map(of_problem, (by_load.laep, by_load.target_params, by_load.max_rerouted))


class Case:
    """A small random problem, and every way to solve it."""

    def __init__(self, seed: int, *, equal: bool = False) -> None:
        rng = random.Random(seed)
        self.rng = rng
        self.loads: dict[int, list[int]] = {}
        self.limits: dict[int, LayerLimits] = {}
        self.params: dict[int, int] = {}
        shape = self._limits(rng)
        for layer in sorted(rng.sample(range(10), rng.randint(1, 3))):
            limits = shape if equal else self._limits(rng)
            self.limits[layer] = limits
            self.loads[layer] = [
                rng.choice([0, rng.randrange(4), rng.randrange(100)]) for _ in range(limits.num_experts)
            ]
            self.loads[layer][rng.randrange(limits.num_experts)] += 1
            self.params[layer] = rng.choice([7, 7, 12, 30])
        held = sum(self.params[layer] * limits.num_experts for layer, limits in self.limits.items())
        self.total = held + rng.randrange(50)
        self.tokens = sum(map(sum, self.loads.values()))

    @staticmethod
    def _limits(rng: random.Random) -> LayerLimits:
        groups = rng.choice([1, 1, 2])
        experts = groups * rng.randint(2, 4)
        floor = rng.randint(1, experts)
        cap = rng.choice([None, None, rng.randint(floor, experts)])
        for multiple in (rng.choice([1, 2, 3]), 1):
            try:
                return LayerLimits(
                    num_experts=experts, multiple_of=multiple, min_experts=floor, max_experts=cap, num_groups=groups
                )
            except SecateurError:
                continue
        return LayerLimits(num_experts=experts)

    def removal(self, layer: int, count: int) -> set[int]:
        limits = self.limits[layer]
        size, gone = limits.num_experts // limits.num_groups, set()
        for start in range(0, limits.num_experts, size):
            ids = sorted(range(start, start + size), key=lambda i: (self.loads[layer][i], -i))
            gone |= set(ids[: size - count // limits.num_groups])
        return gone

    def every_choice(self, uniform: bool) -> list[tuple[int, int, tuple[int, ...]]]:
        """(saving, cost, counts of the layers) of each combination of admissible counts."""
        found = []
        for counts in itertools.product(*(self.admissible(limits) for limits in self.limits.values())):
            if uniform and len(set(counts)) > 1:
                continue
            pairs = list(zip(self.limits, counts, strict=True))
            saving = sum((self.limits[layer].num_experts - count) * self.params[layer] for layer, count in pairs)
            cost = sum(self.loads[layer][i] for layer, count in pairs for i in self.removal(layer, count))
            found.append((saving, cost, counts))
        return found

    @staticmethod
    def admissible(limits: LayerLimits) -> list[int]:
        """The rules for a count, one by one."""
        return [
            count
            for count in range(limits.min_experts, limits.num_experts + 1)
            if (count == limits.num_experts or count % limits.multiple_of == 0)
            and count % limits.num_groups == 0
            and (limits.max_experts is None or count <= limits.max_experts)
        ]

    def check(self, allocation: Allocation, best: tuple[int, ...]) -> None:
        assert tuple(len(kept) for kept in allocation.kept.values()) == best
        for layer, kept in allocation.kept.items():
            assert set(range(len(self.loads[layer]))) - set(kept) == self.removal(layer, len(kept))
            assert list(kept) == sorted(kept)
            assert allocation.rerouted[layer] == sum(self.loads[layer][i] for i in allocation.removed[layer])


def one(loads: list[int], **limits: Any) -> tuple[dict[int, list[int]], dict[int, LayerLimits]]:
    return {0: loads}, {0: LayerLimits(num_experts=len(loads), **limits)}


@pytest.mark.parametrize(("alpha", "beta", "by_1", "by_2", "by_4"), SPEC_TABLE)
def test_worked_example(alpha: float, beta: float, by_1: list[int], by_2: list[int], by_4: list[int]) -> None:
    for multiple, removed in ((1, by_1), (2, by_2), (4, by_4)):
        loads, limits = one(SPEC_LOADS, multiple_of=multiple)
        assert list(laep(loads, limits, alpha=alpha, beta=beta).removed[0]) == removed


def test_counts_are_the_admissible_ones() -> None:
    for seed in range(300):
        for limits in Case(seed).limits.values():
            assert limits.counts() == Case.admissible(limits)
    assert LayerLimits(num_experts=10, multiple_of=4).counts() == [4, 8, 10]
    assert LayerLimits(num_experts=16, multiple_of=2, num_groups=4, min_experts=5).counts() == [8, 12, 16]
    assert LayerLimits(num_experts=16, multiple_of=8, max_experts=15).counts() == [8]


def test_floor_and_cap_overrule_the_thresholds() -> None:
    loads, limits = one(SPEC_LOADS, min_experts=7)
    assert laep(loads, limits, alpha=0.4, beta=1).removed == {0: (0,)}
    loads, limits = one(SPEC_LOADS, max_experts=3)
    assert laep(loads, limits, alpha=0.01, beta=0.01).removed == {0: (0, 1, 2, 4, 6)}
    loads, limits = one(SPEC_LOADS, min_experts=2)
    assert laep(loads, limits, alpha=math.inf, beta=1).kept == {0: (3, 7)}


def test_each_group_loses_as_many_as_the_group_that_may_lose_fewest() -> None:
    # Removable at beta 0.2: 0 2 4 6 1 5, three in the first group of four and three in the second.
    loads, limits = one(SPEC_LOADS, num_groups=2)
    assert laep(loads, limits, alpha=math.inf, beta=0.2).removed == {0: (0, 1, 2, 4, 5, 6)}
    # At alpha 0.2: 0 2 4, two in the first and one in the second.
    assert laep(loads, limits, alpha=0.2, beta=1).removed == {0: (0, 4)}
    loads, limits = one([1, 1, 1, 1, 90, 80, 70, 60], num_groups=2)
    assert laep(loads, limits, alpha=0.5, beta=1).removed == {0: ()}


def test_thresholds_keep_the_fewest_admissible_experts_that_violate_nothing() -> None:
    for seed in range(300):
        case = Case(seed)
        alpha, beta = case.rng.uniform(0.05, 3), case.rng.uniform(0.01, 1)
        allocation = laep(case.loads, case.limits, alpha=alpha, beta=beta)
        best = []
        for layer, limits in case.limits.items():
            allowed = set(laep_removable(case.loads[layer], alpha=alpha, beta=beta))
            counts = Case.admissible(limits)
            best.append(next((count for count in counts if case.removal(layer, count) <= allowed), counts[-1]))
        case.check(allocation, tuple(best))


def test_thresholds_remove_more_as_alpha_and_beta_grow() -> None:
    for seed in range(100):
        case = Case(seed)
        alphas = [*sorted(case.rng.uniform(0.05, 3) for _ in range(3)), math.inf]
        betas = [*sorted(case.rng.uniform(0.01, 1) for _ in range(3)), 1.0]
        grid = {
            (a, b): laep(case.loads, case.limits, alpha=alphas[a], beta=betas[b]).removed
            for a, b in itertools.product(range(4), range(4))
        }
        for (a, b), removed in grid.items():
            for larger in ((a + 1, b), (a, b + 1)):
                if larger in grid:
                    assert all(set(ids) <= set(grid[larger][layer]) for layer, ids in removed.items())


def test_uniform_thresholds_keep_the_smallest_common_count_that_no_layer_exceeds() -> None:
    for seed in range(200):
        case = Case(seed, equal=True)
        alpha, beta = case.rng.uniform(0.05, 3), case.rng.uniform(0.01, 1)
        alone = laep(case.loads, case.limits, alpha=alpha, beta=beta).kept
        common = laep(case.loads, case.limits, alpha=alpha, beta=beta, uniform=True)
        case.check(common, (max(map(len, alone.values())),) * len(alone))


@pytest.mark.parametrize("uniform", [False, True])
def test_target_params_equals_trying_everything(uniform: bool) -> None:
    solved = 0
    for seed in range(400):
        case = Case(seed, equal=uniform)
        target = round(case.rng.uniform(0.3, 0.99), 2)
        choices = case.every_choice(uniform)
        limit = Fraction(str(target)) * case.total
        fitting = [
            (cost, saving, [-count for count in counts], counts)
            for saving, cost, counts in choices
            if case.total - saving <= limit
        ]
        goal: dict[str, Any] = {"params_per_expert": case.params, "total_params": case.total, "target_params": target}
        if fitting:
            solved += 1
            case.check(target_params(case.loads, case.limits, **goal, uniform=uniform), min(fitting)[3])
        else:
            smallest = case.total - max(saving for saving, _, _ in choices)
            with pytest.raises(SecateurError, match=f"target_params is {target}, but the smallest share") as caught:
                target_params(case.loads, case.limits, **goal, uniform=uniform)
            reachable = Fraction(str(caught.value).split("reached is ")[1].split(":")[0])
            assert 0 <= reachable - Fraction(smallest, case.total) < Fraction(1, 10_000)
    assert 100 < solved < 400


@pytest.mark.parametrize("uniform", [False, True])
def test_max_rerouted_equals_trying_everything(uniform: bool) -> None:
    solved = 0
    for seed in range(400):
        case = Case(seed, equal=uniform)
        share = round(case.rng.uniform(0.01, 0.6), 2)
        fitting = [
            (-saving, cost, [-count for count in counts], counts)
            for saving, cost, counts in case.every_choice(uniform)
            if cost <= Fraction(str(share)) * case.tokens
        ]
        goal: dict[str, Any] = {"params_per_expert": case.params, "max_rerouted": share}
        if fitting:
            solved += 1
            case.check(max_rerouted(case.loads, case.limits, **goal, uniform=uniform), min(fitting)[3])
        else:
            with pytest.raises(SecateurError, match=f"max_rerouted is {share}.*max_experts alone re-route more"):
                max_rerouted(case.loads, case.limits, **goal, uniform=uniform)
    assert 100 < solved < 400


def test_rounded_savings_meet_the_goal_within_the_stated_gap() -> None:
    rounded = 0
    for seed in range(200):
        rng = random.Random(seed)
        layers = [
            [(saving, rng.randrange(50)) for saving in sorted(rng.sample(range(200), rng.randint(1, 5)))]
            for _ in range(rng.randint(1, 4))
        ]
        cells = rng.randint(2, 12) * (len(layers) + 1)
        unit = saving_unit(layers, cells)
        rounded += unit > saving_unit(layers)
        assert (1 + sum(max(options)[0] // unit for options in layers)) * (len(layers) + 1) <= cells, "the table fits"
        gap = len(layers) * unit
        combinations = [(sum(s for s, _ in picked), sum(c for _, c in picked)) for picked in itertools.product(*layers)]

        def total(chosen: list[int], layers: list[list[tuple[int, int]]] = layers) -> tuple[int, int]:
            pairs = [options[index] for options, index in zip(layers, chosen, strict=True)]
            return sum(s for s, _ in pairs), sum(c for _, c in pairs)

        need = rng.randint(0, max(s for s, _ in combinations))
        chosen = cheapest_saving(layers, need, cells)
        assert chosen is not None
        saving, cost = total(chosen)
        assert saving >= need
        assert all(cost <= c for s, c in combinations if s >= need + gap)

        budget = min(c for _, c in combinations) + rng.randrange(60)
        chosen = largest_saving(layers, budget, cells)
        assert chosen is not None
        saving, cost = total(chosen)
        assert cost <= budget
        assert all(saving > s - gap for s, c in combinations if c <= budget)
    assert rounded > 100


def test_equal_cost_keeps_more_in_lower_layers() -> None:
    loads = {0: [10, 10], 1: [10, 10], 2: [10, 10]}
    limits = {layer: LayerLimits(num_experts=2) for layer in loads}
    sizes = dict.fromkeys(loads, 5)
    goal = target_params(loads, limits, params_per_expert=sizes, total_params=30, target_params=0.8)
    assert goal.kept == {0: (0, 1), 1: (0,), 2: (0,)}
    assert max_rerouted(loads, limits, params_per_expert=sizes, max_rerouted=0.2).kept == {
        0: (0, 1),
        1: (0, 1),
        2: (0,),
    }


def test_a_model_of_real_size_is_solved_to_the_last_parameter() -> None:
    # 103 layers of 64 experts, as in LAEP's released model: 226,497,024 parameters an expert, 33.34 % of the model.
    rng = random.Random(0)
    loads = {layer: [int(rng.lognormvariate(8, 1.5)) for _ in range(64)] for layer in range(103)}
    limits = {layer: LayerLimits(num_experts=64, multiple_of=8, min_experts=8, max_experts=48) for layer in loads}
    sizes = dict.fromkeys(loads, 226_497_024)
    total = 1_516_320_000_000
    goal = target_params(loads, limits, params_per_expert=sizes, total_params=total, target_params=0.6666)
    removed = sum(map(len, goal.removed.values()))
    assert 0 <= removed * 226_497_024 - 0.3334 * total < 8 * 226_497_024
    back = max_rerouted(
        loads,
        limits,
        params_per_expert=sizes,
        max_rerouted=(sum(goal.rerouted.values()) + 0.5) / sum(map(sum, loads.values())),
    )
    assert back.kept == goal.kept, "the two goals are each other's inverse on the frontier"


def test_unequal_expert_sizes_are_rounded_but_the_goal_is_met() -> None:
    rng = random.Random(0)
    loads = {layer: [int(rng.lognormvariate(8, 1.5)) for _ in range(96)] for layer in range(64)}
    limits = {layer: LayerLimits(num_experts=96, min_experts=8) for layer in loads}
    sizes = {layer: 1_000_003 + 7 * layer for layer in loads}
    total = 96 * sum(sizes.values()) + 1
    goal = target_params(loads, limits, params_per_expert=sizes, total_params=total, target_params=0.67)
    saved = sum(len(ids) * sizes[layer] for layer, ids in goal.removed.items())
    assert 0.33 * total <= saved < 0.332 * total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 8, "multiple_of": 0}, "multiple_of is 0"),
        ({"num_experts": 8, "multiple_of": 2.0}, "multiple_of is 2.0"),
        ({"num_experts": 8, "min_experts": 9}, "min_experts is 9, but the layer has only 8"),
        ({"num_experts": 8, "min_experts": 4, "max_experts": 3}, "max_experts is 3, expected at least min_experts, 4"),
        ({"num_experts": 8, "num_groups": 3}, "num_groups is 3, which does not divide 8"),
        ({"num_experts": 16, "multiple_of": 8, "min_experts": 9, "max_experts": 15}, "no number of experts"),
    ],
)
def test_impossible_limits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        LayerLimits(**arguments)


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    loads, limits = one([1, 2])
    with pytest.raises(SecateurError, match=r"loads are about layers \[1\], limits about layers \[0\]"):
        laep({1: [1, 2]}, limits, alpha=1, beta=1)
    with pytest.raises(SecateurError, match="layer 0: loads of 3 experts, expected 2"):
        laep({0: [1, 2, 3]}, limits, alpha=1, beta=1)
    with pytest.raises(SecateurError, match="layer 0: no token was routed"):
        max_rerouted({0: [0, 0]}, limits, params_per_expert={0: 5}, max_rerouted=0.5)
    with pytest.raises(SecateurError, match="layer 0: params_per_expert is 0"):
        max_rerouted(loads, limits, params_per_expert={}, max_rerouted=0.5)
    with pytest.raises(SecateurError, match="total_params is 9, but the experts alone have 10"):
        target_params(loads, limits, params_per_expert={0: 5}, total_params=9, target_params=0.5)
    with pytest.raises(SecateurError, match=r"target_params is 1\.0, expected a share"):
        target_params(loads, limits, params_per_expert={0: 5}, total_params=10, target_params=1.0)


def test_impossible_goal_names_the_floors_behind_it() -> None:
    loads = {0: [1] * 8, 1: [1] * 8, 2: [1] * 4}
    limits = {
        0: LayerLimits(num_experts=8, multiple_of=4),
        1: LayerLimits(num_experts=8, multiple_of=4),
        2: LayerLimits(num_experts=4, min_experts=3),
    }
    with pytest.raises(SecateurError) as caught:
        target_params(loads, limits, params_per_expert=dict.fromkeys(loads, 10), total_params=220, target_params=0.5)
    message = str(caught.value)
    assert "smallest share that can be reached is 0.591:" in message, "130 of 220, rounded up"
    assert "layers [0, 1] keep at least 4 experts (num_experts=8, multiple_of=4" in message
    assert "layers [2] keep at least 3 experts (num_experts=4, multiple_of=1, num_groups=1, min_experts=3" in message


def test_uniform_without_a_common_count_is_refused() -> None:
    loads = {0: [1, 1, 1, 97], 1: [50, 50]}
    limits = {0: LayerLimits(num_experts=4, min_experts=3), 1: LayerLimits(num_experts=2)}
    with pytest.raises(SecateurError, match="uniform: no number of experts is admissible in every layer"):
        laep(loads, limits, alpha=0.5, beta=1, uniform=True)
    limits[0] = LayerLimits(num_experts=4)
    with pytest.raises(SecateurError, match=r"keep up to 3 experts in layers \[0\].* more than 2"):
        laep({**loads, 0: [1, 20, 20, 20]}, limits, alpha=0.5, beta=1, uniform=True)


def test_decide_writes_the_rule_and_what_it_did_into_the_plan() -> None:
    stats = RouterStats.from_loads({0: SPEC_LOADS, 4: [25] * 4}, 500)
    limits = {0: LayerLimits(num_experts=8), 4: LayerLimits(num_experts=4)}
    plan = decide(stats, limits, Rule(alpha=0.4), params_per_expert={0: 3, 4: 3}, total_params=100)
    assert plan.layers[0].order == (3, 5, 7)
    assert plan.layers[4].order == (0, 1, 2, 3)
    assert (plan.criterion, plan.stats_digest) == ("laep", stats.digest())
    assert plan.details == {
        "rule": {"alpha": 0.4, "beta": 1.0, "uniform": False},
        "rerouted_share": 0.1,
        "layers": {
            "0": {"rerouted_share": 0.11, "alpha": 0.32, "beta": math.nextafter(0.11, 1)},
            "4": {"rerouted_share": 0.0, "alpha": 0.0, "beta": 0.0},
        },
    }
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("rule", [Rule(target_params=0.7), Rule(max_rerouted=0.2), Rule(beta=0.2)])
def test_every_kind_of_rule_decides_as_its_function_does(rule: Rule) -> None:
    loads = {0: SPEC_LOADS, 1: SPEC_LOADS[::-1]}
    limits = {layer: LayerLimits(num_experts=8, multiple_of=2) for layer in loads}
    sizes = {0: 3, 1: 4}
    direct = {
        "target_params": lambda: target_params(
            loads, limits, params_per_expert=sizes, total_params=60, target_params=0.7
        ),
        "max_rerouted": lambda: max_rerouted(loads, limits, params_per_expert=sizes, max_rerouted=0.2),
        "thresholds": lambda: laep(loads, limits, alpha=math.inf, beta=0.2),
    }[rule.kind]()
    plan = decide(RouterStats.from_loads(loads, 500), limits, rule, params_per_expert=sizes, total_params=60)
    assert {layer: entry.order for layer, entry in plan.layers.items()} == direct.kept
    assert any(entry.dropped for entry in plan.layers.values())


def test_implied_thresholds_of_a_goal_give_the_same_plan_layer_by_layer() -> None:
    rng = random.Random(3)
    loads = {layer: rng.sample(range(1, 10_000), 16) for layer in range(6)}
    limits = {layer: LayerLimits(num_experts=16) for layer in loads}
    plan = decide(
        RouterStats.from_loads(loads, 500),
        limits,
        Rule(max_rerouted=0.2),
        params_per_expert=dict.fromkeys(loads, 9),
        total_params=1000,
    )
    layers: Any = plan.details["layers"]
    for layer, entry in plan.layers.items():
        implied = layers[str(layer)]
        if entry.dropped:
            again = laep_removable(loads[layer], alpha=implied["alpha"], beta=implied["beta"])
            assert sorted(again) == list(entry.dropped)
    assert sum(bool(entry.dropped) for entry in plan.layers.values()) >= 3


def test_the_unit_of_saving_is_exact_until_the_table_is_full() -> None:
    layers = [[(0, 0), (99, 1), (100, 1)]]
    assert saving_unit(layers, 2 * 101) == 1
    assert saving_unit(layers, 2 * 100) == 2, "one layer, two rows of 0 to 100 would not fit"
    assert saving_unit([[(0, 0), (60, 1)], [(0, 0), (84, 1)]]) == 12
    assert saving_unit([[(0, 5)]]) == 1
