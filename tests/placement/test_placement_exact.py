"""The integer programme: equal to trying every order, and honest about what it has proven."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.placement import busiest_rank_lower_bound, exact, greedy_with_swaps, rank_loads


def best_of_all(loads: list[int], num_ranks: int) -> float:
    """The least load of the busiest rank, by trying everything: expert by expert, what the ranks hold and count."""
    capacity = len(loads) // num_ranks

    @functools.cache
    def search(expert: int, ranks: tuple[tuple[int, int], ...]) -> float:
        if expert == len(loads):
            return max(total for total, _ in ranks)
        options = {rank for rank in ranks if rank[1] < capacity}
        return min(search(expert + 1, tuple(sorted(_with(ranks, rank, loads[expert])))) for rank in options)

    return search(0, ((0, 0),) * num_ranks)


def _with(ranks: tuple[tuple[int, int], ...], rank: tuple[int, int], load: int) -> list[tuple[int, int]]:
    changed = list(ranks)
    changed.remove(rank)
    return [*changed, (rank[0] + load, rank[1] + 1)]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)]).flatmap(
        lambda shape: st.tuples(
            st.lists(st.integers(0, 1000), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]),
            st.just(shape[0]),
        )
    )
)
def test_equal_to_trying_every_order(case: tuple[list[int], int]) -> None:
    loads, num_ranks = case
    solved = exact(loads, num_ranks)
    assert max(rank_loads(loads, solved.order, num_ranks)) == best_of_all(loads, num_ranks) == solved.lower_bound


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(12, 4), (16, 4)])
def test_better_than_swaps_where_those_are_not_the_best(num_experts: int, num_ranks: int) -> None:
    for loads in np.random.default_rng(0).integers(1, 1000, (5, num_experts)).tolist():
        solved = exact(loads, num_ranks)
        reached = max(rank_loads(loads, solved.order, num_ranks))
        swapped = max(rank_loads(loads, greedy_with_swaps(loads, num_ranks), num_ranks))
        assert busiest_rank_lower_bound(loads, num_ranks) <= solved.lower_bound == reached <= swapped


def test_the_programme_itself_finds_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a poor start, so that the answer cannot be the start's."""
    monkeypatch.setattr("secateur.placement.milp.greedy_with_swaps", lambda loads, num_ranks: [*range(len(loads))])
    loads = [100, 90, 60, 50, 41, 33, 20, 10, 7]
    solved = exact(loads, 3)
    assert sorted(solved.order) == list(range(9))
    assert all(solved.order[start : start + 3] == sorted(solved.order[start : start + 3]) for start in (0, 3, 6))
    assert max(rank_loads(loads, solved.order, 3)) == best_of_all(loads, 3) == solved.lower_bound


def test_without_time_it_returns_the_start_and_claims_no_proof() -> None:
    loads = np.random.default_rng(0).integers(1, 10**6, 96).tolist()
    solved = exact(loads, 24, time_limit=1e-3)
    reached = max(rank_loads(loads, solved.order, 24))
    assert reached <= max(rank_loads(loads, greedy_with_swaps(loads, 24), 24))
    assert busiest_rank_lower_bound(loads, 24) <= solved.lower_bound < reached


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(SecateurError, match="time_limit is"):
        exact([1, 2, 3, 4], 2, time_limit=seconds)
