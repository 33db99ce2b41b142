"""An event that is read says of the experts what its plan says, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.surgery.events import PruneEvent, read_events
from support.run_folders import two_events

PLACED = {"num_ranks": 2, "balance_before": 1.5, "balance_after": 1.0, "over_bound": 1.0, "moved": 1}
FIRST: dict[str, Any] = two_events()[0]  # 8 experts, of which 0, 2 and 5 go
LAYER: dict[str, Any] = FIRST["layers"]["0"]


def test_what_is_read_is_what_was_written() -> None:
    event = PruneEvent.from_json(FIRST | {"beta": 0.5, "placement": {"0": PLACED}})
    again = PruneEvent.from_json(json.loads(json.dumps(event.to_json())))
    assert again == event
    assert (again.experts_before, again.experts_after, again.beta) == (8, 5, 0.5)
    assert again.rerouted_share == (1 + 2 + 3) / (1 + 9 + 2 + 8 + 7 + 3 + 6 + 5)
    assert again.to_json() == event.to_json()


def test_files_of_before_placements_and_with_infinite_thresholds_stay_readable() -> None:
    assert "placement" not in FIRST
    event = PruneEvent.from_json(FIRST | {"alpha": "inf", "beta": "inf"})
    assert (event.placement, event.alpha, event.beta) == (None, None, None)


def test_the_share_of_no_token_is_none_of_them() -> None:
    assert PruneEvent.from_json(FIRST | {"loads": {"0": [0] * 8}}).rerouted_share == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers": {"0": LAYER | {"dropped": [0, 2]}}},
            r"dropped of layer 0 are \(8, 5, \(0, 2\)\) in 'layers', expected \(8, 5, \(0, 2, 5\)\) as in 'plan'",
        ),
        ({"layers": {"0": LAYER, "1": LAYER}}, r"of layer 1 are \(8, .* in 'layers', expected None as in 'plan'"),
        ({"layers": {}}, "of layer 0 are None in 'layers'"),
        ({"loads": {"0": [1, 2]}}, "the plan starts from 8 experts in layer 0, but there are 2 loads"),
        ({"loads": {}}, "the plan starts from 8 experts in layer 0, but there are 0 loads"),
        (
            {"placement": {"0": PLACED, "1": PLACED | {"num_ranks": 4}}},
            "'placement' is of several numbers of ranks, expected one for all layers",
        ),
        ({"reason": "mood"}, "'reason' is 'mood', expected one of stable, step, tokens, rearrange"),
    ],
)
def test_an_event_that_contradicts_itself_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "events.json").write_text(json.dumps([FIRST, FIRST | change]))
    with pytest.raises(SecateurError, match=rf"/events.json, event 2: .*{message}"):
        read_events(tmp_path / "events.json")


def test_loads_are_in_the_order_of_the_layers() -> None:
    event = PruneEvent.from_json(FIRST | {"loads": {"10": [1], "2": [1], **FIRST["loads"]}})
    assert list(event.loads) == [0, 2, 10]
