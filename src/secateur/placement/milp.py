"""The best order, by integer programme (HiGHS, through scipy): for small cases and for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, eye_array, kron

from secateur.errors import SecateurError
from secateur.placement.greedy import greedy_with_room
from secateur.placement.ranks import Solved, busiest_rank_lower_bound, experts_per_rank, rank_loads
from secateur.placement.swaps import greedy_with_swaps

TIME_LIMIT = 60.0
WAKE = 0.2  # seconds between looks at signals
SOLVED = 0  # scipy's status of a proven optimum
_ONE_AT_A_TIME = threading.Lock()


def exact(loads: Sequence[float], num_ranks: int, time_limit: float = TIME_LIMIT) -> Solved:
    """The order of the experts with the least load on the busiest rank, or the best found in time.

    It starts from `greedy_with_swaps` and is never worse. Proven within a few seconds for up to about 32 experts;
    beyond, often not. HiGHS works to a relative precision of one in a million.

    Args:
        loads: (E,) tokens per expert.
        num_ranks: R, a divisor of E.
        time_limit: seconds.

    Returns:
        The order, ascending old ids inside a rank, and what no order can go below: the load of its busiest rank where
        it is proven to be the best, else the best bound that is proven.

    Raises:
        SecateurError: no expert, a load that is not from 0 to 2**53, R that is not a divisor of E, or a time limit
            that is not above 0.
    """
    capacity = experts_per_rank(loads, num_ranks)
    if not time_limit > 0:
        raise SecateurError(f"time_limit is {time_limit}, expected seconds above 0")
    order = (greedy_with_room if capacity <= 2 else greedy_with_swaps)(loads, num_ranks)
    reached = max(rank_loads(loads, order, num_ranks))
    bound = busiest_rank_lower_bound(loads, num_ranks)
    if capacity <= 2 or num_ranks == 1 or reached <= bound:  # greedy is exact with two experts a rank
        return Solved(order=order, lower_bound=reached)
    found, status, dual = _solve(loads, num_ranks, bound, reached, time_limit)
    if found is not None and (better := max(rank_loads(loads, found, num_ranks))) < reached:
        order, reached = found, better
    return Solved(order=order, lower_bound=reached if status == SOLVED else min(max(bound, dual), reached))


def _solve(
    loads: Sequence[float], num_ranks: int, bound: float, reached: float, time_limit: float
) -> tuple[list[int] | None, int, float]:
    """Order if one was found, status and dual bound of: x[expert, rank] in {0, 1}, minimise the busiest rank's load.

    Each expert is on one rank, each rank has C experts. Ranks have no names: the i-th busiest expert stands on one of
    the first i + 1 ranks.
    """
    E, R = len(loads), num_ranks
    mean = sum(loads) / R  # the unit, so that HiGHS's tolerances are relative
    weights = np.asarray(loads, dtype=np.float64) / mean
    once = kron(eye_array(E), np.ones((1, R)))
    count = kron(np.ones((1, E)), eye_array(R))
    load = kron(weights[None, :], eye_array(R))
    table = block_array([[once, csr_array((E, 1))], [count, csr_array((R, 1))], [load, csr_array(-np.ones((R, 1)))]])
    low = np.concatenate([np.ones(E), np.full(R, E // R), np.full(R, -np.inf)])
    high = np.concatenate([np.ones(E), np.full(R, E // R), np.zeros(R)])
    allowed = np.ones((E, R))
    for place, expert in enumerate(np.argsort(-weights, kind="stable")[:R]):
        allowed[expert, place + 1 :] = 0
    with solver_apart():
        result = _interruptible(
            lambda: milp(
                np.append(np.zeros(E * R), 1),
                constraints=LinearConstraint(table.tocsr(), low, high),
                bounds=Bounds(
                    np.append(np.zeros(E * R), bound / mean), np.append(allowed.ravel(), reached / mean * (1 + 1e-9))
                ),
                integrality=np.append(np.ones(E * R), 0),
                options={"time_limit": time_limit, "mip_rel_gap": 0},
            )
        )
    dual = bound if result.mip_dual_bound is None else result.mip_dual_bound * mean
    if result.x is None:
        return None, result.status, dual
    rank_of = result.x[:-1].reshape(E, R).argmax(axis=1)
    return np.argsort(rank_of, kind="stable").tolist(), result.status, dual


def _interruptible(solve: Callable[[], Any]) -> Any:
    """Solve in a thread of its own: Python sees no signal while HiGHS runs in the thread that is to see it.

    After an interruption HiGHS runs on until its time limit, or until the process ends.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(solve())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="milp", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(WAKE)
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def solver_apart() -> Iterator[None]:
    """Send what HiGHS prints on standard output, now and then, to standard error: the output belongs to the caller.

    File descriptor 1 is the whole process's: two threads take turns, or the second would keep what the first has put
    there as the original.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as back:
        with contextlib.suppress(OSError):  # a process may have none of the two
            kept = os.dup(1)
            back.callback(os.close, kept)
            flush = ctypes.CDLL(None).fflush
            flush(None)  # what was printed before goes where it was printed to
            back.callback(os.dup2, kept, 1)  # before it is needed: an interrupt may come at any moment
            back.callback(flush, None)
            os.dup2(2, 1)
        yield
