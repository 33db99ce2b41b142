"""Plans with several sources obey the laws of what they mean: rows of matrices, taken, weighted and added up."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.errors import SecateurError
from secateur.plans import FREE, MAPPED, MEAN, MIXED, REPRESENTATIVE, SUM, LayerPlan, Matrix, Neurons, Plan, Source
from support.made_plans import plan_of, random_layer

Experts = NDArray[np.float64]  # (E, F, D): neurons of experts; whole numbers, so that all sums here are exact
Rows = NDArray[np.float64]  # (E, D): rows of a router


def meaning(layer: LayerPlan, experts: Experts) -> Experts:
    """The new experts, written out from the definition and independently of `then`."""
    new = []
    for place, old in enumerate(layer.order):
        entry = layer.sources.get(place, (Source(expert=old),))
        parts = [s.weight * (experts[s.expert] if s.neurons is None else experts[s.expert][list(s.neurons.ids)])
                 for s in entry]  # fmt: skip
        new.append(sum(parts[1:], parts[0]))
    return np.stack(new)


def router(plan: Plan, layer: LayerPlan, rows: Rows) -> Rows:
    """The rows of the router that are cut and merged as the plan says."""
    new = []
    for place, old in enumerate(layer.order):
        entry = layer.sources.get(place, (Source(expert=old),))
        parts = {
            REPRESENTATIVE: [rows[old]],
            MEAN: [s.weight * rows[s.expert] for s in entry],
            SUM: [rows[expert] for expert in {s.expert for s in entry}],
        }[plan.rows]
        new.append(sum(parts[1:], parts[0]))
    return np.stack(new)


def chain(rng: random.Random, length: int, **rest: str) -> list[Plan]:
    """Plans, each for what the one before leaves."""
    num_experts, width, found = rng.randint(1, 6), rng.randint(1, 5), []
    for _ in range(length):
        found.append(plan_of(random_layer(rng, num_experts, width), **rest))
        layer = found[-1].layers[3]
        num_experts, width = layer.experts_after, layer.width_after or width
    return found


def numbers(rng: random.Random, *shape: int) -> NDArray[np.float64]:
    return np.array([float(rng.randint(-99, 99)) for _ in range(int(np.prod(shape)))]).reshape(shape)


@pytest.mark.parametrize("rows", [REPRESENTATIVE, MEAN])
def test_composing_equals_applying_one_after_the_other(rows: str) -> None:
    rng = random.Random(0)
    merged = 0
    for _ in range(300):
        first, second = chain(rng, 2, rows=rows)
        a, b = first.layers[3], second.layers[3]
        experts = numbers(rng, a.experts_before, b.width_before or a.width_before or 5, 2)
        if a.width_before:
            experts = numbers(rng, a.experts_before, a.width_before, 2)
        both = first.compose(second)
        assert np.array_equal(meaning(both.layers[3], experts), meaning(b, meaning(a, experts)))
        if both.rows == rows:
            lines = numbers(rng, a.experts_before, 2)
            then = router(replace(second, rows=rows), b, router(replace(first, rows=rows), a, lines))
            assert np.array_equal(router(both, both.layers[3], lines), then)
            merged += not both.is_copy
    assert merged > 100, "the draws show nothing"


def test_composing_is_associative_and_the_identity_changes_nothing() -> None:
    rng = random.Random(1)
    for _ in range(200):
        first, second, third = chain(rng, 3)
        left, right = first.compose(second).compose(third), first.compose(second.compose(third))
        assert left == right
        before, after = (Plan.identity({3: count}) for count in (first.layers[3].experts_before,
                                                                 first.layers[3].experts_after))  # fmt: skip
        assert before.compose(first).layers == first.layers == first.compose(after).layers


def test_what_merges_nothing_has_no_rule_for_rows() -> None:
    pair = (Source(expert=0, weight=0.5), Source(expert=1, weight=0.5))
    first = plan_of(LayerPlan(experts_before=3, order=(0, 2), sources={0: pair}), rows=MEAN)
    drop, stay = plan_of(LayerPlan(experts_before=2, order=(1,))), plan_of(LayerPlan.identity(1))
    assert first.compose(drop).compose(stay) == first.compose(drop.compose(stay))
    assert first.compose(drop).rows == REPRESENTATIVE
    thinned = {new: (Source(expert=new, neurons=Neurons([1])),) for new in range(3)}
    thin = plan_of(LayerPlan(experts_before=3, order=(0, 1, 2), sources=thinned, width_before=2))
    assert thin.compose(first).rows == MEAN


def test_weights_of_a_softmax_in_float32_sum_up_to_one_and_stay_so_when_composed(tmp_path: Path) -> None:
    weights = (np.float32([1, 2, 4]) / np.float32(7.0000003)).tolist()
    sources = tuple(Source(expert=expert, weight=weight) for expert, weight in enumerate(weights))
    plan = plan_of(LayerPlan(experts_before=3, order=(0, 1, 2), sources=dict.fromkeys(range(3), sources)))
    again = plan
    for _ in range(50):
        again = again.compose(plan)
    assert abs(sum(source.weight for source in again.layers[3].sources[0]) - 1) < 1e-12
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_equal_plans_have_equal_files_where_a_weight_is_0() -> None:
    plans = [
        plan_of(LayerPlan(experts_before=2, order=(0,), sources={0: (Source(expert=0), Source(expert=1, weight=zero))}))
        for zero in (0.0, -0.0)
    ]
    assert plans[0] == plans[1]
    assert str(plans[0].to_json()) == str(plans[1].to_json())


def test_a_permutation_of_experts_and_of_their_neurons_is_undone_by_its_inverse() -> None:
    rng = random.Random(2)
    for _ in range(100):
        count, width = rng.randint(1, 5), rng.randint(1, 5)
        order = rng.sample(range(count), count)
        sources = {
            new: (Source(expert=old, neurons=Neurons(rng.sample(range(width), width))),)
            for new, old in enumerate(order)
            if rng.random() < 0.7
        }
        plan = plan_of(LayerPlan(experts_before=count, order=tuple(order), sources=sources, width_before=width))
        identity = Plan.identity({3: count}).layers
        assert plan.compose(plan.invert()).layers == identity == plan.invert().compose(plan).layers


def test_an_old_expert_may_stand_in_an_entry_with_several_permutations() -> None:
    pair = (Source(expert=0, weight=0.5), Source(expert=1, weight=0.5, neurons=Neurons([1, 0])))
    first = plan_of(LayerPlan(experts_before=2, order=(0, 1), sources={0: pair}, width_before=2))
    both = (Source(expert=0, weight=0.5), Source(expert=1, weight=0.5))
    second = plan_of(LayerPlan(experts_before=2, order=(0,), sources={0: both}))
    assert first.compose(second).layers[3].sources == {
        0: (
            Source(expert=0, weight=0.25),
            Source(expert=1, weight=0.5),
            Source(expert=1, weight=0.25, neurons=Neurons([1, 0])),
        )
    }
    assert first.compose(second).layers[3].width_before == 2


def test_a_slot_that_goes_is_dropped_or_absorbed() -> None:
    mean = (Source(expert=2, weight=0.75), Source(expert=0, weight=0.25))
    layer = plan_of(LayerPlan(experts_before=5, order=(2, 4), sources={0: mean})).layers[3]
    assert (layer.gone, layer.absorbed, layer.dropped) == ((0, 1, 3), (0,), (1, 3))
    assert layer.sources[0] == tuple(reversed(mean)), "sources are kept by old id"
    assert layer.made_of(1) == (Source(expert=4),)
    assert (layer.is_copy, layer.is_identity) == (False, False)
    rng = random.Random(3)
    for _ in range(50):
        layer = plan_of(random_layer(rng, 6, 3)).layers[3]
        assert sorted([*layer.order, *layer.absorbed, *layer.dropped]) == list(range(6))


def test_an_entry_that_is_a_copy_lists_no_source_and_all_neurons_in_order_are_none() -> None:
    whole = {
        0: (Source(expert=1, weight=1, neurons=Neurons([0, 1, 2])),),
        1: (Source(expert=0),),
    }
    plan = plan_of(LayerPlan(experts_before=2, order=(1, 0), sources=whole, width_before=3))
    assert plan == plan_of(LayerPlan(experts_before=2, order=(1, 0)))
    assert plan.is_copy
    assert plan.to_json()["version"] == 1


def test_filled_lists_every_layer_and_changes_nothing_else() -> None:
    plan = plan_of(LayerPlan(experts_before=3, order=(0, 2)), removed="zero-slot")
    filled = plan.filled({1: 4, 3: 3})
    assert filled == replace(plan, layers={1: LayerPlan.identity(4), 3: plan.layers[3]})
    assert filled.layers[1].is_identity
    assert not filled.is_identity
    assert plan.filled({3: 3}) is plan


def mapped(groups: list[list[int]], **rest: str) -> Plan:
    """The slots of each group lead to one expert, that of the first."""
    sources = {
        new: tuple(Source(expert=old, weight=1 / len(group)) for old in group) for new, group in enumerate(groups)
    }
    order = tuple(group[0] for group in groups)
    layer = LayerPlan(experts_before=sum(map(len, groups)), order=order, sources=sources)
    return plan_of(layer, **{"removed": MAPPED, **rest})


def test_mapped_slots_compose_as_maps_do() -> None:
    both = mapped([[0, 2], [1], [4, 3]]).compose(mapped([[2, 0], [1]]))
    assert both.removed == MAPPED
    target = {source.expert: new for new in range(2) for source in both.layers[3].made_of(new)}
    assert target == {4: 0, 3: 0, 0: 0, 2: 0, 1: 1}
    assert mapped([[0], [1]]).compose(plan_of(LayerPlan(experts_before=2, order=(0,)))).removed == MIXED


@pytest.mark.parametrize("rest", [{"removed": MAPPED}, {"removed": "reroute", "rows": SUM}])
def test_a_slot_leads_to_one_expert_where_slots_are_mapped_or_rows_added_up(rest: dict[str, str]) -> None:
    twice = {new: (Source(expert=2, weight=0.5), Source(expert=new, weight=0.5)) for new in (0, 1)}
    layer = LayerPlan(experts_before=3, order=(0, 1), sources=twice)
    with pytest.raises(SecateurError, match="plan, layer 3: expert 2 is in the new experts 0 and 1, but "):
        plan_of(layer, **rest)
    assert plan_of(layer).layers[3].absorbed == (2,)


def test_rows_of_two_rules_are_mixed_and_a_plan_that_merges_nothing_has_no_rule() -> None:
    merge, prune = mapped([[0, 1], [2]], removed="reroute"), plan_of(LayerPlan(experts_before=2, order=(0,)))
    later = mapped([[0, 1]], removed="reroute", rows=MEAN)
    assert replace(merge, rows=SUM).compose(later).rows == MIXED
    assert replace(merge, rows=SUM).compose(replace(later, rows=SUM)).rows == SUM
    assert replace(merge, rows=MEAN).compose(prune).rows == MEAN


def test_weights_that_do_not_sum_up_to_one_are_said() -> None:
    layer = LayerPlan(
        experts_before=2, order=(0,), sources={0: (Source(expert=0, weight=1.5), Source(expert=1, weight=-1.0))}
    )
    free = plan_of(layer, weights=FREE)
    one = plan_of(LayerPlan.identity(1))
    assert free.compose(one).weights == one.compose(plan_of(LayerPlan.identity(1), weights=FREE)).weights == FREE
    with pytest.raises(SecateurError, match=r"new expert 0: weights \[1.5, -1.0\] sum up to 0.5, expected 1 and none"):
        plan_of(layer)


def test_solved_matrices_do_not_compose() -> None:
    solved = plan_of(LayerPlan(experts_before=2, order=(0, 1), solved={"0.down_proj": Matrix(np.ones((2, 3)))}))
    other = Plan.identity({3: 2})
    for first, second in ((solved, other), (other, solved)):
        with pytest.raises(SecateurError, match=r"layer 3: 0.down_proj was solved for .* apply the plans one after"):
            first.compose(second)
    with pytest.raises(SecateurError, match="layer 3: the plan mixes experts"):
        solved.invert()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"sources": {2: (Source(expert=0),)}}, "new expert 2: it is in sources, expected one from 0 to 1"),
        ({"sources": {0: ()}}, r"new expert 0: its sources are \(\), expected Source values, at least one"),
        ({"sources": {0: (Source(expert=4),)}}, r"expert ids \[4\] are out of range, expected 0 to 3"),
        ({"sources": {0: (Source(expert=3),)}}, "takes the place of expert 0, which is not among its sources"),
        ({"sources": {0: (Source(expert=0, weight=0.5),)}}, "sum up to 0.5, expected 1"),
        (
            {"sources": {0: (Source(expert=0, weight=1.5), Source(expert=1, weight=-0.5))}},
            r"weights \[1.5, -0.5\] sum up to 1.0, expected 1 and none below 0",
        ),
        ({"sources": {0: (Source(expert=0, weight=float("nan")),)}}, "a weight is nan, expected a finite number"),
        ({"sources": {0: (Source(expert=0, weight=True),)}}, "a weight is True, expected a finite number"),
        (
            {"sources": {0: (Source(expert=0, weight=0.5), Source(expert=0, weight=0.5))}},
            "expert 0 is listed twice with the same neurons",
        ),
        ({"sources": {0: (Source(expert=0, neurons=Neurons([1])),)}}, "width_before does not say of how many"),
        (
            {"sources": {0: (Source(expert=0, neurons=Neurons([0, 3])),)}, "width_before": 3},
            "neuron 3 is out of range, expected 0 to 2",
        ),
        (
            {"sources": {0: (Source(expert=0, neurons=Neurons([0])),)}, "width_before": 3},
            r"new experts of \['1', '3'\] neurons, expected one number for all",
        ),
        ({"sources": [1]}, "expected a list in order, mappings in sources and solved"),
        ({"solved": None}, "expected a list in order, mappings in sources and solved"),
        ({"sources": {0: (Source(expert=0, weight=10**400),)}}, "a weight is 1000"),
        ({"width_before": 0}, "width_before is 0, expected 1 or more"),
        ({"solved": {"2.down_proj": Matrix(np.ones((1, 1)))}}, "solved for '2.down_proj', expected 'router', or NEW"),
        ({"solved": {"0.DOWN": Matrix(np.ones((1, 1)))}}, "solved for '0.DOWN', expected"),
        ({"solved": {"router": 3}}, "solved for router: found 3, expected a Matrix"),
    ],
)
def test_sources_that_do_not_fit_are_refused_by_name(layer: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError, match=f"plan, layer 3.*{message}"):
        plan_of(LayerPlan(experts_before=4, order=(0, 1), **layer))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neurons([]), "expected a list of whole numbers"),
        (lambda: Neurons([0, 1, 0]), r"\[0\] are listed more than once"),
        (lambda: Neurons([-1]), "ids from -1 to -1"),
        (lambda: Neurons(5), "expected a list of whole numbers"),  # type: ignore[arg-type]
        (lambda: Neurons([[0], [1, 2]]), "expected an array of numbers"),  # type: ignore[list-item]
        (lambda: Matrix([[1.0], [1.0, 2.0]]), "expected an array of numbers"),
        (lambda: Plan(layers={10**6: LayerPlan.identity(2)}, criterion="x"), "layer id is 1000000, expected"),
        (lambda: Plan(layers={0: LayerPlan.identity(2**20 + 1)}, criterion="x"), "experts_before is 1048577, expected"),
        (lambda: Neurons([0.5]), "float64 of shape"),
        (lambda: Matrix([1.0]), r"float64 of shape \(1,\)"),
        (lambda: Matrix([[1]]), "int64 of shape"),
        (lambda: Matrix([[float("inf")]]), "an entry is not finite"),
        (lambda: Plan(layers={0: LayerPlan.identity(2)}, criterion="x", rows="max"), "rows is 'max', expected one of"),
        (lambda: Plan(layers={0: LayerPlan.identity(2)}, criterion="x", weights="any"), "weights is 'any', expected"),
        (lambda: Plan(layers={0: LayerPlan.identity(2)}, criterion="x", removed="gone"), "removed is 'gone', expected"),
    ],
)
def test_what_cannot_be_in_a_plan_is_refused(make: object, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        make()  # type: ignore[operator]


def test_later_plans_must_fit_experts_and_neurons() -> None:
    def cut(width: int, kept: list[int]) -> Plan:
        entry = {0: (Source(expert=0, neurons=Neurons(kept)),)}
        return plan_of(LayerPlan(experts_before=1, order=(0,), sources=entry, width_before=width))

    assert cut(4, [3, 1, 0]).compose(cut(3, [2, 0])).layers == cut(4, [0, 3]).layers
    with pytest.raises(SecateurError, match="starts from experts of 4 neurons, but the earlier one leaves 3"):
        cut(4, [3, 1, 0]).compose(cut(4, [0]))
    with pytest.raises(SecateurError, match="keeps 1 of 4 neurons"):
        cut(4, [0]).invert()


def test_arrays_cannot_be_changed(tmp_path: Path) -> None:
    neurons = Neurons([1, 0])
    with pytest.raises(ValueError, match="read-only"):
        neurons.array[0] = 1
    with pytest.raises(AttributeError, match="cannot be changed"):
        neurons.array = np.zeros(1)
    assert len({neurons, Neurons((1, 0)), Neurons([0, 1])}) == 2
