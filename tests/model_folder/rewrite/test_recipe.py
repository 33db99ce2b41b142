"""The recipe of a plan tells what our commands noted of its making, and keeps silent about what it does not know."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.model_folder.rewrite.recipe import Details, recipe

DETAILS: dict[str, Any] = {
    "keep": {"share": 0.5},
    "rule": {"alpha": 0.4, "beta": None, "total_params": 7},
    "allocation": "uniform",
    "seed": 3,
    "data": {"specs": ["mine"], "tokens": 64, "packed": True, "domains": {"code": {"tokens": 64}}},
    "rerouted_share": 0.125,
    "super_experts": {"protected": {"0": [1, 2]}, "rescued": {}},
    "never_routed": {"0": [5], "3": [0, 7]},
    "zero_weights": None,
}
ROWS = {
    "criterion": "test",
    "kept": "0.5 of the experts",
    "rule": "alpha 0.4, total_params 7",
    "counts of the layers": "uniform",
    "a removed expert": "its row of the router went too: its tokens go to the next experts",
    "seed": "3",
    "calibration: tokens": "64",
    "calibration: packed": "yes",
    "calibration: domains": "(code (tokens 64))",
    "routed tokens that lose their expert": "12.50 %",
    "super-experts protected": "layer 0: 1 2",
    "of these the criterion would have dropped": "none",
    "never routed to": "layer 0: 5; layer 3: 0 7",
    "statistics": "sha256 ab",
}
OF = {  # rows that tell of each detail
    "keep": {"kept"},
    "rule": {"rule"},
    "allocation": {"counts of the layers"},
    "seed": {"seed"},
    "data": {name for name in ROWS if name.startswith("calibration: ")},
    "rerouted_share": {"routed tokens that lose their expert"},
    "super_experts": {"super-experts protected", "of these the criterion would have dropped"},
    "never_routed": {"never routed to"},
    "zero_weights": set(),
}


def rows(details: Any) -> dict[str, str]:
    return dict(recipe({"criterion": "test", "details": details, "stats_digest": "ab"}))


def test_every_detail_has_its_row() -> None:
    assert rows(DETAILS) == ROWS
    assert OF.keys() == DETAILS.keys() == set(Details.__struct_fields__)


@pytest.mark.parametrize("name", DETAILS)
@pytest.mark.parametrize("other", [None, True, [[3]], {}, {"a": 3}, {"0": 3}, {"protected": [1]}, "nan"])
def test_a_detail_of_another_form_changes_no_other_row_and_ends_in_no_error(name: str, other: Any) -> None:
    found = rows(DETAILS | {name: other})
    rest = ROWS.keys() - OF[name]
    assert {row: found[row] for row in rest} == {row: ROWS[row] for row in rest}


@pytest.mark.parametrize("details", [None, {}, {"of somebody else": 1}])
def test_without_details_there_are_only_the_rows_that_every_plan_has(details: Any) -> None:
    assert rows(details).keys() == {"criterion", "a removed expert", "statistics"}


def test_an_allocation_that_decided_nothing_is_not_told() -> None:
    found = rows({"keep": {"layers": {"1": 5, "2": 8}}, "allocation": "uniform"})
    assert (found["kept"], found["counts of the layers"]) == ("experts of each layer: 1 5, 2 8", "given one by one")
