"""Greedy with swaps: never worse than greedy, near the best order, the same for a layer alone and among many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.placement import (
    busiest_rank_lower_bound,
    exact,
    greedy_with_room,
    greedy_with_swaps,
    level_ranks,
    rank_loads,
    swaps,
)


def busiest(loads: list[int], order: list[int], num_ranks: int) -> float:
    return max(rank_loads(loads, order, num_ranks))


@st.composite
def loads_and_ranks(draw: st.DrawFn, *, most_ranks: int = 6, most_each: int = 7) -> tuple[list[int], int]:
    num_ranks = draw(st.integers(1, most_ranks))
    size = num_ranks * draw(st.integers(1, most_each))
    largest = draw(st.sampled_from([20, 10**6]))  # small loads tie often, and one token more is much
    return draw(st.lists(st.integers(0, largest), min_size=size, max_size=size)), num_ranks


@settings(max_examples=60, deadline=None)
@given(loads_and_ranks())
def test_never_worse_than_greedy_and_never_below_the_bound(case: tuple[list[int], int]) -> None:
    loads, num_ranks = case
    order = greedy_with_swaps(loads, num_ranks)
    capacity = len(loads) // num_ranks
    blocks = [order[start : start + capacity] for start in range(0, len(order), capacity)]
    assert sorted(order) == list(range(len(loads)))
    assert all(block == sorted(block) for block in blocks)
    reached = busiest(loads, order, num_ranks)
    assert busiest_rank_lower_bound(loads, num_ranks) <= reached
    assert reached <= busiest(loads, greedy_with_room(loads, num_ranks), num_ranks)


def lognormal(seed: int, *shape: int) -> list[list[int]]:
    draws: list[list[int]] = (np.random.default_rng(seed).lognormal(size=shape) * 10000).astype(int).tolist()
    return draws


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 8), (12, 3), (16, 2), (16, 4), (24, 8), (30, 5), (64, 8)])
def test_a_layer_gets_the_same_order_alone_and_among_many(num_experts: int, num_ranks: int) -> None:
    layers = lognormal(1, 7, num_experts)
    together = level_ranks(layers, num_ranks)
    assert together.tolist() == [greedy_with_swaps(layer, num_ranks) for layer in layers]
    assert together[::-1].tolist() == level_ranks(layers[::-1], num_ranks).tolist()


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(16, 4), (24, 8), (32, 4)])
def test_no_round_makes_the_busiest_rank_busier(
    monkeypatch: pytest.MonkeyPatch, num_experts: int, num_ranks: int
) -> None:
    for layer in np.random.default_rng(0).integers(1, 20, (20, num_experts)).tolist():
        reached = [busiest(layer, greedy_with_room(layer, num_ranks), num_ranks)]
        for num_rounds in (1, 3, 4, 5, 8, 12, 16):
            monkeypatch.setattr(swaps, "NUM_ROUNDS", num_rounds)
            swaps._rounds.cache_clear()
            reached.append(busiest(layer, greedy_with_swaps(layer, num_ranks), num_ranks))
        assert reached == sorted(reached, reverse=True)
    monkeypatch.undo()
    swaps._rounds.cache_clear()


def test_more_layers_than_are_worked_on_at_once_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = lognormal(2, 9, 24)
    expected = level_ranks(layers, 4).tolist()
    monkeypatch.setattr(swaps, "CHUNK", 1)
    assert level_ranks(layers, 4).tolist() == expected


@pytest.mark.parametrize("capacity", [3, 4, 6, 7])
def test_two_ranks_of_few_experts_are_solved_exactly(capacity: int) -> None:
    size = 2 * capacity
    for loads in np.random.default_rng(3).integers(1, 10**6, (6, size)).tolist():
        halves = (sum(loads[expert] for expert in half) for half in itertools.combinations(range(size), capacity))
        best = min(max(half, sum(loads) - half) for half in halves)
        assert busiest(loads, greedy_with_swaps(loads, 2), 2) == best


def test_two_experts_a_rank_are_solved_exactly() -> None:
    for loads in lognormal(4, 10, 8):
        best = min(busiest(loads, list(order), 4) for order in itertools.permutations(range(8)) if _is_first(order))
        assert busiest(loads, greedy_with_swaps(loads, 4), 4) == best


def _is_first(order: tuple[int, ...]) -> bool:
    """One of the orders that differ in names only: pairs ascending inside, and by their first expert."""
    return order[0] < order[2] < order[4] < order[6] and all(order[pair] < order[pair + 1] for pair in range(0, 8, 2))


@pytest.mark.parametrize(("num_experts", "num_ranks", "draws"), [(12, 4, 4), (16, 4, 3), (24, 8, 1)])
def test_within_half_a_percent_of_the_exact_optimum(num_experts: int, num_ranks: int, draws: int) -> None:
    level = np.random.default_rng(7).integers(1, 1000, (draws, num_experts)).tolist()
    for loads in [*lognormal(5, 2, num_experts), *level]:
        solved = exact(loads, num_ranks, time_limit=10)
        optimum = busiest(loads, solved.order, num_ranks)
        assert solved.lower_bound == optimum, "not proven: choose other loads for this test"
        assert busiest(loads, greedy_with_swaps(loads, num_ranks), num_ranks) <= 1.005 * optimum


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(32, 2), (48, 8), (64, 4), (256, 8), (512, 64)])
def test_ranks_of_a_planted_level_order_come_out_level(num_experts: int, num_ranks: int) -> None:
    """Every rank of the planted order has the same load, so the optimum is known at any size."""
    draw = np.random.default_rng(6)
    capacity = num_experts // num_ranks
    shares = draw.lognormal(sigma=0.5, size=(num_ranks, capacity))
    whole = np.floor(shares / shares.sum(axis=1, keepdims=True) * 1e6)
    whole[:, 0] += 1e6 - whole.sum(axis=1)
    loads = draw.permutation(whole.ravel()).astype(int).tolist()
    greedy, reached = (
        busiest(loads, find(loads, num_ranks), num_ranks) for find in (greedy_with_room, greedy_with_swaps)
    )
    assert reached <= 1.0005 * 1e6
    assert reached - 1e6 <= max((greedy - 1e6) / 10, 1)


@pytest.mark.parametrize(
    ("ranks", "dealt", "whole", "ways"), [(2, 2, False, 6), (2, 2, True, 3), (3, 3, True, 280), (2, 5, False, 252)]
)
def test_every_way_to_deal_is_there_once(ranks: int, dealt: int, whole: bool, ways: int) -> None:
    deals, sums = swaps._deals(ranks, dealt, whole)
    cards = ranks * dealt
    assert deals.shape == (ways, cards)
    assert deals[0].tolist() == list(range(cards))
    hands = {
        tuple(frozenset(deal[start : start + dealt]) for start in range(0, cards, dealt)) for deal in deals.tolist()
    }
    assert len(hands if not whole else {frozenset(hand) for hand in hands}) == ways
    weights = 2.0 ** np.arange(cards)
    expected = weights[deals].reshape(ways, ranks, dealt).sum(axis=2).T
    assert (weights @ sums == expected.ravel()).all()


def test_one_expert_a_rank_stays_where_it_is() -> None:
    assert greedy_with_swaps([3, 9, 1, 5], 4) == [0, 1, 2, 3]


def test_fractions_and_nothing_are_loads_too() -> None:
    fractions = [0.5, 0.25, 0.125, 0.125, 0.5, 0.5]  # two of the three 0.5 stand together, at best with 0.125
    assert max(rank_loads(fractions, greedy_with_swaps(fractions, 2), 2)) == 1.125
    assert sorted(greedy_with_swaps([0] * 12, 3)) == list(range(12))


@pytest.mark.parametrize(
    ("loads", "num_ranks", "message"),
    [
        ([1, 2, 3, 4], 2, r"loads have shape \(4,\), expected \(layers, experts\)"),
        ([[]], 1, r"loads have shape \(1, 0\)"),
        ([[1, 2], [3, -1]], 1, "load of expert 1 of layer 1 is -1.0"),
        ([[1, 2], [float("nan"), 1]], 1, "load of expert 0 of layer 1 is nan"),
        ([[1, 2, 3]], 2, "3 experts do not divide over 2 ranks"),
        ([[1, 2, 3]], 0, "3 experts do not divide over 0 ranks"),
    ],
)
def test_bad_tables_are_named(loads: list[list[float]], num_ranks: int, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        level_ranks(loads, num_ranks)
