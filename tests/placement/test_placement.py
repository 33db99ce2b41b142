"""Greedy, the bound and the balance: the published worked examples, and what must hold for every load."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.placement import (
    balance,
    busiest_rank_lower_bound,
    exact,
    greedy_with_room,
    greedy_with_swaps,
    place,
    rank_loads,
)

WORKED = [100, 90, 60, 50, 40, 30, 20, 10]


@pytest.mark.parametrize(
    ("num_ranks", "order", "reached", "contiguous"),
    [
        (2, [0, 3, 4, 7, 1, 2, 5, 6], [200, 200], [300, 100]),
        (4, [0, 7, 1, 6, 2, 5, 3, 4], [110, 110, 90, 90], [190, 110, 70, 30]),
    ],
)
def test_the_worked_examples_of_laep(
    num_ranks: int, order: list[int], reached: list[int], contiguous: list[int]
) -> None:
    assert greedy_with_room(WORKED, num_ranks) == order
    assert rank_loads(WORKED, order, num_ranks) == reached
    assert rank_loads(WORKED, range(8), num_ranks) == contiguous


def test_bound_and_balance_of_the_worked_example() -> None:
    # S = 400. Two ranks: 400 / 2 = 200 against 100 + (10 + 20 + 30) = 160; four: 100 against 100 + 10.
    assert busiest_rank_lower_bound(WORKED, 2) == 200
    assert busiest_rank_lower_bound(WORKED, 4) == 110
    assert balance([300, 100]) == 1.5
    assert balance([110, 110, 90, 90]) == 1.1


def test_ties_go_to_the_lower_expert_and_the_lower_rank() -> None:
    assert greedy_with_room([5, 5, 5, 5], 2) == [0, 2, 1, 3]
    assert greedy_with_room([0, 0, 0, 0, 0, 0], 3) == [0, 1, 2, 3, 4, 5]


def test_a_full_rank_takes_no_more_even_when_it_is_the_idlest() -> None:
    # rank 0: 100; rank 1: 1 + 1 is full, so the last expert must go to rank 0.
    assert greedy_with_room([100, 1, 1, 1], 2) == [0, 3, 1, 2]


def test_greedy_is_the_plain_rule_step_by_step() -> None:
    draw = random.Random(0)
    for num_ranks, capacity in [(1, 5), (2, 8), (5, 3), (8, 6), (16, 2)]:
        loads = [draw.randrange(50) for _ in range(num_ranks * capacity)]
        blocks: list[list[int]] = [[] for _ in range(num_ranks)]
        for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert)):
            with_room = [rank for rank in range(num_ranks) if len(blocks[rank]) < capacity]
            idlest = min(with_room, key=lambda rank: (sum(loads[one] for one in blocks[rank]), rank))
            blocks[idlest].append(expert)
        assert greedy_with_room(loads, num_ranks) == [expert for block in blocks for expert in sorted(block)]


@st.composite
def _loads_and_ranks(draw: st.DrawFn) -> tuple[list[int], int]:
    num_ranks = draw(st.integers(1, 8))
    size = num_ranks * draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size)), num_ranks


@settings(max_examples=150, deadline=None)
@given(_loads_and_ranks())
def test_each_rank_gets_its_share_of_experts_and_no_order_beats_the_bound(case: tuple[list[int], int]) -> None:
    loads, num_ranks = case
    capacity = len(loads) // num_ranks
    order = greedy_with_room(loads, num_ranks)
    blocks = [order[start : start + capacity] for start in range(0, len(order), capacity)]
    assert sorted(order) == list(range(len(loads)))
    assert len(blocks) == num_ranks
    assert all(block == sorted(block) for block in blocks)
    reached = rank_loads(loads, order, num_ranks)
    assert reached == [sum(loads[expert] for expert in block) for block in blocks]
    bound = busiest_rank_lower_bound(loads, num_ranks)
    assert bound <= max(reached)
    assert bound <= max(rank_loads(loads, range(len(loads)), num_ranks))


@settings(max_examples=50, deadline=None)
@given(_loads_and_ranks())
def test_an_expert_moves_with_its_load(case: tuple[list[int], int]) -> None:
    loads, num_ranks = case
    order = greedy_with_room(loads, num_ranks)
    moved = [loads[old] for old in order]
    assert rank_loads(moved, range(len(loads)), num_ranks) == rank_loads(loads, order, num_ranks)


def test_fractions_of_tokens_are_loads_too() -> None:
    assert greedy_with_room([0.5, 0.25, 0.125, 0.125], 2) == [0, 3, 1, 2]
    assert rank_loads([0.5, 0.25, 0.125, 0.125], [0, 3, 1, 2], 2) == [0.625, 0.375]


@pytest.mark.parametrize("function", [greedy_with_room, greedy_with_swaps, busiest_rank_lower_bound, exact, place])
@pytest.mark.parametrize(
    ("loads", "num_ranks", "message"),
    [
        ([1, 2, 3], 2, "3 experts do not divide over 2 ranks"),
        ([1, 2, 3], 0, "num_ranks is 0"),
        ([1, 2, 3], -1, "num_ranks is -1"),
        ([], 1, "loads are empty"),
        ([1, -2], 1, "load of expert 1 is -2"),
        ([1, float("nan")], 1, "load of expert 1 is nan"),
        ([float("inf"), 1], 1, "load of expert 0 is inf"),
        ([1, 2**53 + 1], 1, "load of expert 1 is 9007199254740993, expected a number from 0 to 2..53"),
        ([1, 10**400], 1, "load of expert 1 is 1000"),
    ],
)
def test_bad_input_is_named(function: object, loads: list[float], num_ranks: int, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        function(loads, num_ranks)  # type: ignore[operator]


def test_an_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(SecateurError, match="each expert id from 0 to 3 once"):
        rank_loads([1, 2, 3, 4], [0, 1, 2, 2], 2)


def test_balance_of_nothing_has_no_value() -> None:
    for nothing in ([], [0, 0]):
        with pytest.raises(SecateurError, match="above 0"):
            balance(nothing)
