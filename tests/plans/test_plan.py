"""A plan says the same after saving, composing and inverting, and cannot hold nonsense."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.plans import LayerPlan, Plan


def plan_of(orders: dict[int, tuple[int, list[int]]], **rest: Any) -> Plan:
    layers = {layer: LayerPlan(experts_before=before, order=tuple(order)) for layer, (before, order) in orders.items()}
    return Plan(layers=layers, criterion=rest.pop("criterion", "test"), **rest)


def random_plan(rng: random.Random, experts: dict[int, int]) -> Plan:
    return plan_of(
        {layer: (count, rng.sample(range(count), rng.randint(1, count))) for layer, count in experts.items()}
    )


def apply(plan: Plan, model: dict[int, list[str]]) -> dict[int, list[str]]:
    """What a plan means, written independently of `compose`: pick names by old id."""
    return {
        layer: [names[old] for old in plan.layers[layer].order] if layer in plan.layers else names
        for layer, names in model.items()
    }


def test_layer_plan_counts_what_is_dropped() -> None:
    layer = LayerPlan(experts_before=8, order=(3, 0, 5))
    assert (layer.experts_after, layer.dropped, layer.is_ascending) == (3, (1, 2, 4, 6, 7), False)
    assert LayerPlan(experts_before=8, order=(0, 3, 5)).is_ascending


def test_json_is_the_documented_format() -> None:
    plan = plan_of({2: (8, [3, 0, 5])}, criterion="laep", details={"alpha": math.inf, "beta": 0.1}, stats_digest="ab")
    assert plan.to_json() == {
        "format": "secateur-plan",
        "version": 1,
        "criterion": "laep",
        "details": {"alpha": "inf", "beta": 0.1},
        "stats_digest": "ab",
        "layers": {"2": {"experts_before": 8, "order": [3, 0, 5]}},
    }


def test_saved_plan_reads_back_equal(tmp_path: Path) -> None:
    details: dict[str, Any] = {"rule": {"alpha": math.inf, "share": 0.1}, "list": (1, 2, None, True), "text": "é"}
    plan = plan_of({10: (4, [3, 1]), 2: (8, [0])}, details=details, stats_digest="ab")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == plan.to_json()
    assert '    "2": {"experts_before": 8, "order": [0]},\n' in text, "one line for each layer, ascending"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_compose_equals_applying_one_after_the_other() -> None:
    rng = random.Random(0)
    for _ in range(100):
        model = {layer: [f"{layer}.{expert}" for expert in range(rng.randint(1, 9))] for layer in range(4)}
        first = random_plan(rng, {layer: len(model[layer]) for layer in (0, 1, 2)})
        between = apply(first, model)
        second = random_plan(rng, {layer: len(between[layer]) for layer in (1, 2, 3)})
        last = apply(second, between)
        third = random_plan(rng, {layer: len(last[layer]) for layer in (0, 2)})
        assert apply(first.compose(second), model) == last
        assert first.compose(second).compose(third) == first.compose(second.compose(third))


def test_compose_keeps_both_decisions() -> None:
    first = plan_of({0: (4, [1, 2])}, criterion="a", details={"alpha": 0.2}, stats_digest="x")
    second = plan_of({0: (2, [1])}, criterion="b")
    assert first.compose(second).details == {
        "steps": [
            {"criterion": "a", "details": {"alpha": 0.2}, "stats_digest": "x"},
            {"criterion": "b", "details": {}, "stats_digest": None},
        ]
    }


def test_compose_refuses_a_plan_for_another_count() -> None:
    with pytest.raises(SecateurError, match=r"layer 0: the later plan starts from 4 experts.* leaves 2"):
        plan_of({0: (4, [1, 2])}).compose(plan_of({0: (4, [0])}))


def test_inverse_undoes_every_permutation_of_four() -> None:
    identity = Plan.identity({0: 4})
    for order in itertools.permutations(range(4)):
        plan = plan_of({0: (4, list(order))})
        assert plan.compose(plan.invert()).layers == identity.layers
        assert plan.invert().compose(plan).layers == identity.layers


def test_a_plan_that_drops_has_no_inverse() -> None:
    with pytest.raises(SecateurError, match="layer 0: the plan keeps 2 of 4"):
        plan_of({0: (4, [0, 1])}).invert()


def test_describe_names_what_goes_and_what_moves() -> None:
    assert plan_of({0: (4, [0, 2]), 1: (3, [2, 1, 0])}, criterion="laep").describe().splitlines() == [
        "laep: keeps 5 of 7 experts in 2 layers",
        "layer 0: 4 -> 2, drops 1 3",
        "layer 1: 3 -> 3, new order 2 1 0",
    ]


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({}, "names no layer"),
        ({-1: (4, [0])}, "layer id is -1"),
        ({0: (4, [])}, "layer 0: no expert is kept"),
        ({3: (4, [0, 4])}, r"layer 3: expert ids \[4\] are out of range, expected 0 to 3"),
        ({0: (4, [-1])}, r"\[-1\] are out of range"),
        ({0: (4, [1, 1])}, r"\[1\] are listed more than once"),
        ({0: (4, [True])}, "is True, expected an integer"),
        ({0: (4, [1.0])}, "is 1.0, expected an integer"),
        ({0: (4.0, [1])}, "experts_before is 4.0, expected an integer"),
    ],
)
def test_invalid_layers_are_refused_by_name(orders: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        plan_of(orders)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"details": {"a": [1, math.nan]}}, r"details.a\[1\] is nan"),
        ({"details": {"a": object()}}, "details.a is <object"),
        ({"criterion": ""}, "criterion is ''"),
        ({"stats_digest": 3}, "stats_digest is 3"),
    ],
)
def test_invalid_details_are_refused_by_name(rest: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        plan_of({0: (2, [0])}, **rest)


GOOD = (
    '{"format": "secateur-plan", "version": 1, "criterion": "x", "layers": {"0": {"experts_before": 2, "order": [1]}}}'
)


def test_minimal_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(GOOD)
    assert Plan.load(tmp_path / "plan.json") == plan_of({0: (2, [1])}, criterion="x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("secateur-plan", "other", "'format' is 'other', expected 'secateur-plan'"),
        ('"version": 1', '"version": 3, "new": 3', "'version' is 3, expected one of 1, 2"),
        ('"version": 1', '"version": true', "'version' is True, expected 1"),
        ('"criterion": "x", ', "", "'criterion' is missing, found "),
        ('"criterion": "x", ', '"criterion": "x", "masks": 1, ', "'masks' is unknown, expected format, version"),
        ('"order": [1]', '"order": [1], "w": 1', "'layers.0.w' is unknown, expected experts_before, order"),
        ('"order": [1]', '"order": 1', "'layers.0.order' is 1, expected a list"),
        ('"order": [1]', '"order": ["1"]', r"'layers.0.order\[0\]' is '1', expected an expert id"),
        ('"order": [1]', '"order": [NaN]', "found NaN"),
        ('{"0": ', '{"00": ', "'layers' has the key '00', expected a layer id"),
        ('{"0": ', '{"0": {}, "0": ', "lists a key twice"),
        ('{"format"', '["format"', "not JSON"),
        (GOOD, "[1]", r"plan: found \[1\], expected an object"),
        (GOOD, "\xff", "not JSON in UTF-8"),
        (GOOD, "[" * 100_000, "not JSON"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.json"
    assert old in GOOD
    path.write_bytes(GOOD.replace(old, new).encode("latin-1"))
    with pytest.raises(SecateurError, match=message) as caught:
        Plan.load(path)
    assert "plan.json" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"plan file .*absent.json: cannot be read"):
        Plan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (None, None, None),
        (None, "reroute", "reroute"),
        ("reroute", None, "reroute"),
        ("zero-slot", "zero-slot", "zero-slot"),
        (None, "zero-slot", "mixed"),
        ("zero-slot", None, "mixed"),
    ],
)
def test_a_composed_plan_removes_as_both_do_and_a_plan_that_does_not_say_re_routes(
    first: str | None, second: str | None, both: str | None
) -> None:
    plans = [plan_of({0: (4, [0, 1, 2])}, removed=first), plan_of({0: (3, [0, 1])}, removed=second)]
    assert plans[0].compose(plans[1]).removed == both
