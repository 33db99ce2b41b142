"""Greedy, then experts are exchanged between ranks until the busiest rank cannot be relieved any more.

A round pairs the ranks up at random and deals each pair's experts anew, as level as they can be dealt; that is every
swap of one, two or more experts between the two at once. The best order so far is kept.

Legend: L layers, E experts, R ranks, C = E / R experts a rank, H hands (sets of ranks that deal with one another),
Q ranks a hand, M experts of each rank that are dealt, S ways to deal a hand. All layers are worked on at once, and none
knows of the others: a layer gets the same order alone and among many, on every run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from secateur.errors import SecateurError
from secateur.placement.greedy import greedy_blocks
from secateur.placement.ranks import LARGEST_LOAD, Floats, Ints, experts_per_rank

NUM_ROUNDS = 240
# A layer is done when its busiest rank is this near to the lower bound, and a tenth as far from it as greedy left it.
NEAR_ENOUGH = 5e-4
CHUNK = 2**17  # sums worked on at once: what a processor's cache holds
# Where all experts of a hand are dealt, dealing them level soon changes nothing. So every fourth round deals at random,
# as long as no rank gets more than this share above the busiest rank of the best order so far.
LEVEL = None
CYCLE = (LEVEL, LEVEL, LEVEL, 0.0, LEVEL, LEVEL, LEVEL, 0.03)


def greedy_with_swaps(loads: Sequence[float], num_ranks: int) -> list[int]:
    """The order of the experts that levels the ranks, found by greedy and then by exchanges between ranks.

    Never worse than `greedy_with_room`; in our benchmark within 0.5 % of the best order wherever that is known.

    Args:
        loads: (E,) tokens per expert.
        num_ranks: R, a divisor of E.

    Returns:
        (E,) order[new] = old; ascending old ids inside a rank.

    Raises:
        SecateurError: no expert, a load that is not from 0 to 2**53, or R that is not a divisor of E.
    """
    experts_per_rank(loads, num_ranks)
    order: list[int] = level_ranks([loads], num_ranks)[0].tolist()
    return order


def level_ranks(loads: Sequence[Sequence[float]] | Floats, num_ranks: int) -> Ints:
    """`greedy_with_swaps` for many layers with the same number of experts, in much less time a layer.

    Args:
        loads: (L, E) tokens per expert.
        num_ranks: R, a divisor of E.

    Returns:
        (L, E) order[layer, new] = old.

    Raises:
        SecateurError: as `greedy_with_swaps`, or `loads` is not a table.
    """
    table = np.asarray(loads, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise SecateurError(f"loads have shape {table.shape}, expected (layers, experts)")
    L, E = table.shape
    wrong = ~((table >= 0) & (table <= LARGEST_LOAD))
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise SecateurError(
            f"load of expert {expert} of layer {layer} is {table[layer, expert]}, expected a number from 0 to 2**53"
        )
    if num_ranks < 1 or E % num_ranks:
        raise SecateurError(f"{E} experts do not divide over {num_ranks} ranks, expected a multiple")
    C = E // num_ranks
    if C == 1:  # any order is as good
        return np.tile(np.arange(E), (L, 1))
    blocks = [greedy_blocks(layer, num_ranks, C) for layer in table.tolist()]
    order = np.array(blocks).reshape(L, E)
    if C > 2 and num_ranks > 1:  # with two experts a rank greedy is exact
        Q, M = _hand(num_ranks, C)
        step = max(1, CHUNK // (num_ranks * len(_deals(Q, M, M == C)[0])))
        chunks = [slice(start, start + step) for start in range(0, L, step)]
        order = np.concatenate([_exchange(table[chunk], order[chunk], num_ranks) for chunk in chunks])
    return np.sort(order.reshape(L, num_ranks, C), axis=2).reshape(L, E)


def _exchange(table: Floats, order: Ints, num_ranks: int) -> Ints:
    """(L, E) orders that are at least as level as `order`."""
    L, E = table.shape
    C = E // num_ranks
    Q, M = _hand(num_ranks, C)
    H = num_ranks // Q
    deals, sums = _deals(Q, M, M == C)
    rounds = _rounds(num_ranks, C, Q, M)
    if M == C and num_ranks == Q:
        rounds = rounds[:1]  # every order has been tried
    noise = _noise(len(deals))
    cycle = CYCLE if M == C else (LEVEL,)
    hands = np.arange(L * H).reshape(L, H, 1)
    first_card, first_sum = hands * (Q * M), hands * (Q * len(deals)) + np.arange(Q) * len(deals)

    result = order.copy()
    layers = np.arange(L)  # the ones not done yet; all below is about these
    held = np.take_along_axis(table, order, axis=1)  # the load at each place of the order
    totals = held.reshape(L, num_ranks, C).sum(axis=2)
    best, best_order = totals.max(axis=1), order.copy()
    bounds = _lower_bounds(table, num_ranks)
    goal = bounds + np.minimum(NEAR_ENOUGH * bounds, np.maximum((best - bounds) / 10, 1e-6 * bounds))
    open_ = best > goal
    for number, (ranks, places) in enumerate(rounds):
        if not open_.all():
            result[layers] = best_order
            layers, order, held, totals, best, best_order, goal = (
                values[open_] for values in (layers, order, held, totals, best, best_order, goal)
            )
            if not len(layers):
                return result
        cards = held.take(places, axis=1)  # (layers, H, Q * M)
        dealt = (cards @ sums).reshape(len(layers), H, Q, len(deals))
        dealt += (totals.take(ranks, axis=1) - dealt[..., 0])[..., None]  # deal 0 leaves all as it is
        busiest = dealt.max(axis=2)  # (layers, H, S)
        share = cycle[number % len(cycle)]
        if share is not LEVEL:
            allowed = busiest < (best * ((1 + share) * (1 - 1e-12)))[:, None, None]
            busiest = np.where(allowed, noise[number], busiest)
        choice = busiest.argmin(axis=2)[..., None]
        taken = first_card[: len(layers)] + deals[choice[..., 0]]
        held[:, places] = cards.take(taken)
        order[:, places] = order.take(places, axis=1).take(taken)
        totals[:, ranks] = dealt.take(first_sum[: len(layers)] + choice)
        now = totals.max(axis=1)
        better = now < best
        best[better] = now[better]
        best_order[better] = order[better]
        open_ = best > goal
    result[layers] = best_order
    return result


def _hand(num_ranks: int, capacity: int) -> tuple[int, int]:
    """Q and M: as much as there is time for. Two ranks with up to 8 experts, dealt in every way, are solved exactly."""
    if num_ranks == 2 and capacity <= 8:
        return 2, capacity
    if capacity == 3:
        return 3, 3
    return 2, min(capacity, 5)


def _lower_bounds(table: Floats, num_ranks: int) -> Floats:
    """(L,) `busiest_rank_lower_bound` of each layer; with whole loads, the whole number above it."""
    ascending = np.sort(table, axis=1)
    smallest = ascending[:, : table.shape[1] // num_ranks - 1].sum(axis=1)
    bounds: Floats = np.maximum(ascending.sum(axis=1) / num_ranks, ascending[:, -1] + smallest)
    return np.where((table == np.floor(table)).all(axis=1), np.ceil(bounds), bounds)


@functools.lru_cache(maxsize=64)
def _deals(Q: int, M: int, whole: bool) -> tuple[Ints, Floats]:  # noqa: N803
    """(S, Q * M) which card goes to each place, and (Q * M, Q * S) which cards each rank's sum has.

    Deal 0 leaves all as it is. Where ranks deal all they hold (`whole`), deals that only change names are left out.
    """
    rows: list[list[int]] = [[]]
    for _ in range(Q):
        rows = [
            [*row, *kept]
            for row in rows
            for left in [[card for card in range(Q * M) if card not in row]]
            for kept in itertools.combinations(left, M)
            if not whole or kept[0] == left[0]
        ]
    deals = np.array(rows)
    sums = np.zeros((Q * M, Q, len(deals)))
    for hand in range(Q):
        sums[deals[:, hand * M : (hand + 1) * M], hand, np.arange(len(deals))[:, None]] = 1
    return deals, sums.reshape(Q * M, -1)


@functools.lru_cache(maxsize=64)
def _rounds(num_ranks: int, capacity: int, Q: int, M: int) -> list[tuple[Ints, Ints]]:  # noqa: N803
    """For each round, (H, Q) the ranks of each hand and (H, Q * M) the places in the order that they deal."""
    draw = np.random.default_rng(0)
    H = num_ranks // Q
    rounds: list[tuple[Ints, Ints]] = []
    while len(rounds) < NUM_ROUNDS:
        ranks = draw.permutation(num_ranks)[: H * Q].reshape(H, Q)
        slots = draw.permuted(np.tile(np.arange(capacity), (H * Q, 1)), axis=1)[:, :M]
        if num_ranks == Q or not rounds or _hands(ranks) != _hands(rounds[-1][0]):  # dealing twice alike is idle
            rounds.append((ranks, (ranks.reshape(-1, 1) * capacity + slots).reshape(H, Q * M)))
    return rounds


def _hands(ranks: Ints) -> set[frozenset[int]]:
    return {frozenset(hand) for hand in ranks.tolist()}


@functools.lru_cache(maxsize=64)
def _noise(num_deals: int) -> Floats:
    """(rounds, S) below any load, to draw one of the deals that are allowed."""
    return np.asarray(np.random.default_rng(0).random((NUM_ROUNDS, num_deals)) - 1)
