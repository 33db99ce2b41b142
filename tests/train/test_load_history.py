"""Loads between any two marks are those of the windows between them, whatever was thinned."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.train.load_history import MOST, LoadHistory

TOKENS = 100


def windows(number: int, seed: int = 0) -> list[dict[int, list[int]]]:
    rng = random.Random(seed)
    return [{0: [1 + rng.randrange(50) for _ in range(3)], 4: [1 + rng.randrange(9), 7]} for _ in range(number)]


def filled(given: list[dict[int, list[int]]]) -> LoadHistory:
    history = LoadHistory()
    for window in given:
        history.add(window, TOKENS)
    return history


@pytest.mark.parametrize("number", [1, 2, MOST - 1, MOST, MOST + 1, 5 * MOST + 3, 1000])
def test_loads_between_marks_are_the_sums_of_their_windows(number: int) -> None:
    given = windows(number)
    history = filled(given)
    assert (history.num_windows, history.num_tokens) == (number, TOKENS * number)
    for first, last in [(history.marks[0], history.marks[-1]), *itertools.pairwise(history.marks)]:
        expected = {
            layer: [sum(window[layer][e] for window in given[first.windows : last.windows]) for e in range(len(loads))]
            for layer, loads in given[0].items()
        }
        assert history.between(first, last) == expected


def test_marks_are_few_and_evenly_spread_and_the_first_window_and_the_newest_stay() -> None:
    history = LoadHistory()
    for number, window in enumerate(windows(3000), start=1):
        history.add(window, TOKENS)
        at = [mark.windows for mark in history.marks]
        assert at[0] == 0
        assert at[1] == 1
        assert at[-1] == number
        assert len(at) <= MOST
        if number > MOST:
            assert len(at) > MOST // 2
            gaps = [b - a for a, b in itertools.pairwise(at[2:-1])]
            assert len(set(gaps)) == 1


def test_the_mark_at_a_number_of_tokens_is_the_last_one_before_it() -> None:
    history = filled(windows(5))
    assert [history.marks[history.mark_at(tokens)].tokens for tokens in (0, 99, 100, 250, 499, 500, 900)] == [
        0, 0, 100, 200, 400, 500, 500,
    ]  # fmt: skip


def test_reordered_experts_are_followed() -> None:
    given = windows(9)
    history = filled(given)
    history.reorder({0: [2, 0, 1]})
    moved = filled([{0: [window[0][2], window[0][0], window[0][1]], 4: window[4]} for window in given])
    assert history.state() == moved.state()


def test_restored_history_goes_on_identically() -> None:
    given = windows(3 * MOST)
    for cut in (0, 1, 7, MOST, 2 * MOST + 5):
        first, second = filled(given[:cut]), LoadHistory()
        second.restore(json.loads(json.dumps(first.state())))
        for window in given[cut:]:
            first.add(window, TOKENS)
            second.add(window, TOKENS)
        assert second.state() == first.state()


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({}, "no layer"),
        ({0: [1, 2], 1: [0, 0]}, "window, layer 1: no token was routed to any of its 2 experts"),
        ({0: [1, 2]}, r"layers \[1\] have \[0\] experts, but \[2\] in the windows before"),
        ({0: [1, 2, 3], 1: [1, 2]}, r"layers \[0\] have \[3\] experts, but \[2\]"),
        ({0: [1, -2], 1: [1, 2]}, "a load is -2"),
    ],
)
def test_an_unusable_window_is_refused_and_changes_nothing(loads: Any, message: str) -> None:
    history = LoadHistory()
    history.add({0: [1, 2], 1: [1, 2]}, TOKENS)
    before = history.state()
    with pytest.raises(SecateurError, match=message):
        history.add(loads, TOKENS)
    with pytest.raises(SecateurError, match="found 0 tokens"):
        history.add({0: [1, 2], 1: [1, 2]}, 0)
    assert history.state() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"marks": 3}, "'marks' is 3, expected a list"),
        ({"stride": -1}, "'stride' is -1"),
        ({"marks": [{"windows": 1, "tokens": 2, "sums": {"0": [1]}}]}, "not those of one run in order"),
        ({"marks": [{"windows": 0, "tokens": 0, "sums": {"x": [1]}}]}, "has the key 'x', expected a layer id"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    history = filled(windows(3))
    before = history.state()
    with pytest.raises(SecateurError, match=message):
        history.restore({**before, **change})
    assert history.state() == before


def test_marks_that_go_back_or_have_other_layers_are_refused() -> None:
    state = filled(windows(3)).state()
    for broken in (state["marks"][::-1], [*state["marks"], {**state["marks"][-1], "sums": {"0": [1, 2, 3]}}]):
        with pytest.raises(SecateurError, match="not those of one run in order"):
            LoadHistory().restore({**state, "marks": broken})
