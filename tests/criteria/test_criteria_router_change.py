"""Router change by the values of the published definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.criteria.router_change import (
    RouterChange,
    router_difference_norm,
    router_norm_absolute_change,
    router_norm_change,
)
from secateur.errors import SecateurError

# columns are experts: norms 5, 1, 2 before and 5, 5, 1 after
BEFORE = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]]).T
AFTER = torch.tensor([[4.0, 3.0, 0.0], [3.0, 4.0, -1.0]]).T


def close(found: Tensor, expected: list[float]) -> bool:
    return found.dtype == torch.float64 and torch.allclose(found, torch.tensor(expected).double(), atol=1e-6)


def test_the_signed_change_differs_from_both_options() -> None:
    change = RouterChange.of_rows("router", BEFORE, AFTER)
    assert close(router_norm_change(change), [0.0, 4.0, -1.0])
    assert close(router_norm_absolute_change(change), [0.0, 4.0, 1.0])
    assert close(router_difference_norm(change), [1.414214, 4.472136, 3.0])
    assert router_norm_change(change).argsort().tolist() == [2, 0, 1]
    assert router_norm_absolute_change(change).argsort().tolist() == [0, 2, 1]
    assert router_difference_norm(change).argsort().tolist() == [0, 2, 1]


def test_a_change_below_the_step_of_bfloat16_norms_is_seen() -> None:
    before = torch.full((1, 1024), 1.0, dtype=torch.bfloat16)
    after = before.clone()
    after[0, 0] = 1.0078125
    change = router_norm_change(RouterChange.of_rows("router", before, after))
    assert close(change, [(1023 + 1.0078125**2) ** 0.5 - 32.0])
    assert 0 < float(change) < 2**-8 * 32


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (BEFORE, AFTER[:2], r"router: \(3, 2\) in the pre-trained model and \(2, 2\)"),
        (BEFORE[0], AFTER[0], r"expected the same \(experts, width\)"),
        (BEFORE, AFTER.int(), "of the fine-tuned model has type torch.int32"),
        (BEFORE * float("nan"), AFTER, "of the pre-trained model has entries that are not finite"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(before: Tensor, after: Tensor, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        RouterChange.of_rows("router", before, after)
