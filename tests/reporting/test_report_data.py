"""The report: what it reads from a run folder and what it makes of the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from secateur.errors import SecateurError
from secateur.reporting.numbers import compare, limit, load_history, report_json, smooth
from secateur.reporting.run_data import read_run
from secateur.reporting.words import summary_paragraph
from secateur.surgery.events import PruneEvent
from support.run_folders import STEP_TOKENS, lines_of, make_run, tiny_run, two_events

pytestmark = pytest.mark.filterwarnings("error")


def test_balance_of_the_worked_example_of_laep(tmp_path: Path) -> None:
    """Busiest over mean: 300/200 and 200/200; 190/100 and 110/100; with one expert a rank order has no effect."""
    run = read_run(tiny_run(tmp_path / "run", [[100, 90, 60, 50, 40, 30, 20, 10]]))
    report = report_json(run)
    found = {ranks: (entry["before"], entry["after"]) for ranks, entry in report["balance"].items()}
    assert found == {"2": (1.5, 1.0), "4": (1.9, 1.1), "8": (2.0, 2.0)}
    assert report["balance"]["4"]["rank_loads"]["0"]["after"] == [110, 110, 90, 90]
    assert report["balance_left_out"] == {}


def test_balance_adds_the_busiest_ranks_of_the_layers(tmp_path: Path) -> None:
    """Layer 0 is 3 and 1 in the old order, layer 1 is 0 and 4: (3 + 4) / (2 + 2), though the sums are 3 and 5."""
    run = read_run(tiny_run(tmp_path / "run", [[2, 1, 1, 0], [0, 0, 3, 1]]))
    report = report_json(run)
    assert report["balance"]["2"]["before"] == 7 / 4
    assert report["balance"]["2"]["after"] == 5 / 4
    assert report["balance_left_out"]["8"] == "layer 0 has 4 experts, not a multiple of 8, and one more such layer"


def test_an_expert_keeps_its_first_id_through_two_prunings(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 9, 2, 8, 7, 3, 6, 5]], events=two_events())
    windows = [(20, [8, 8, 8, 8, 8, 8, 8, 8]), (30, [1, 2, 3, 4, 5]), (40, [1, 2, 3, 4, 5]), (50, [1, 2, 3, 2])]
    lines = [{"step": step, "tokens": 10 * step, "layers": {"0": load}} for step, load in windows]
    (folder / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert run.first_ids(1) == {0: (7, 6, 4, 3, 1)}
    assert run.first_ids(2) == {0: (7, 6, 3, 1)}
    history = load_history(run, 0)
    gone = math.nan
    expected = [
        [1, gone, gone, gone],
        [1, 5 / 3, 5 / 3, 1],
        [1, gone, gone, gone],
        [1, 4 / 3, 4 / 3, 3 / 2],
        [1, 1, 1, gone],
        [1, gone, gone, gone],
        [1, 2 / 3, 2 / 3, 1],
        [1, 1 / 3, 1 / 3, 1 / 2],
    ]
    np.testing.assert_array_equal(history.ratio, np.array(expected))
    assert history.edges.tolist() == [0, 200, 300, 400, 500]
    # Old order 1 3 6 7 carries 9 + 8 against 6 + 5 at the decision; the last window 2 + 3 against 2 + 1.
    balance = report_json(run)["balance"]["2"]
    assert balance["rank_loads"]["0"] == {"before": [17, 11], "after": [14, 14], "lower_bound": 14}
    assert balance["last_window"]["before"] == 5 / 4


@pytest.mark.parametrize(("last", "load", "is_later"), [(40, [1, 2, 3, 4, 5], False), (50, [4, 3, 2, 1], True)])
def test_a_window_that_ended_with_the_pruning_does_not_judge_its_placement(
    last: int, load: list[int], is_later: bool, tmp_path: Path
) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 9, 2, 8, 7, 3, 6, 5]], events=two_events())  # prunings at 20 and 40
    windows = [(20, [8] * 8), (last, load)]
    lines = [{"step": step, "tokens": 10 * step, "layers": {"0": load}} for step, load in windows]
    (folder / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report_json(read_run(folder))["balance"]["2"]["last_window"]
    assert found is None or found.keys() == {"before", "after"}
    assert (found is not None) is is_later


def test_the_speed_of_an_unfinished_run_leaves_out_warm_up_and_prunings(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 9, 2, 8, 7, 3, 6, 5]], events=two_events())  # prunings at 20 and 40
    speeds = {5: 1, 10: 20, 15: 22, 20: 90, 30: 2, 40: 3, 45: 4, 50: 30, 55: 36}
    lines = [
        {"kind": "train", "step": step, "tokens": 10 * step, "phase": "stable", "tokens_per_second": speed}
        for step, speed in speeds.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report_json(read_run(folder))["tokens_per_second"] == {"before": 21, "after": 33}


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", control=False, num_layers=1)
    whole = read_run(folder)
    for name in ("metrics.jsonl", "loads.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-9])
    cut = read_run(folder)
    assert (cut.evals, cut.train, cut.windows) == (whole.evals[:-1], whole.train, whole.windows[:-1])


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", control=False, num_layers=1)
    whole = read_run(folder)
    for name in ("metrics.jsonl", "loads.jsonl"):
        lines = lines_of(folder / name)
        (folder / name).write_text("\n".join([*lines[:20], *lines[12:]]) + "\n")
    again = read_run(folder)
    assert (again.evals, again.train) == (whole.evals, whole.train)
    assert [window.layers for window in again.windows] == [window.layers for window in whole.windows]


def test_a_loss_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 2]])
    point = {"kind": "eval", "step": 5, "tokens": 50, "validation_loss": math.nan, "validation_loss_by_domain": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    run = read_run(folder)
    assert report_json(run)["validation_loss"] is None
    assert "The last validation loss is not a finite number." in summary_paragraph(run)


def test_a_control_at_another_point_is_compared_where_both_have_been(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", num_layers=1)
    (folder / "control" / "summary.json").unlink()
    lines = lines_of(folder / "control" / "metrics.jsonl")
    (folder / "control" / "metrics.jsonl").write_text("\n".join(lines[:24]) + "\n")
    versus = compare(read_run(folder))
    assert versus is not None
    assert versus.tokens == 400 * STEP_TOKENS
    assert versus.difference == pytest.approx(0.02, abs=1e-12)


BROKEN: list[tuple[str, Callable[[str], str], str]] = [
    ("metrics.jsonl", lambda text: text.replace('"step": 40', '"step": 4 0', 1), r"metrics\.jsonl:2: not JSON"),
    (
        "metrics.jsonl",
        lambda text: text.replace('"loss": ', '"loss": "x', 1).replace(",", '",', 5),
        r"metrics\.jsonl:1",
    ),
    ("metrics.jsonl", lambda text: text.replace('"kind": "train"', '"kind": "test"', 1), r":1: 'kind' is 'test'"),
    ("metrics.jsonl", lambda text: text.replace('"tokens": 40960', '"tokens": 4.5', 1), r":1: 'tokens' is 4.5"),
    ("loads.jsonl", lambda text: text.replace('{"0": [', '{"0": [3, ', 1), r"loads\.jsonl:1: found loads of \{0: 17\}"),
    ("loads.jsonl", lambda text: text.replace('{"0": [', '{"0": [-', 1), r"loads\.jsonl:1: 'layers.0\[0\]' is -"),
    (
        "metrics.jsonl",
        lambda text: text.replace('"tokens": 81920', '"tokens": 40960', 1),
        r"metrics\.jsonl:2: 'tokens' is 40960, expected more than the 40960 of step 20",
    ),
    ("loads.jsonl", lambda text: "[]\n" + text, r"loads\.jsonl:1: found \[\], expected an object"),
    ("events.json", lambda text: text[:-1], r"events\.json: not JSON"),
    ("events.json", lambda text: "{}", r"events\.json: found \{\}, expected a list"),
    ("events.json", lambda text: text.replace('"stable"', '"mood"'), r"event 1: 'reason' is 'mood', expected one of"),
    (
        "events.json",
        lambda text: text.replace('"experts_before": 16', '"experts_before": 17'),
        r"event 1: .* of layer 0 are \(17, 16, ",
    ),
    ("run.json", lambda text: text.replace('"experts"', '"parts"'), r"run\.json: 'model.experts' is missing"),
    ("summary.json", lambda text: text.replace('"steps": 600', '"steps": "all"'), r"summary\.json: 'steps' is 'all'"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BROKEN)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, damage: Callable[[str], str], message: str
) -> None:
    folder = make_run(tmp_path / "run", control=False, num_layers=1)
    path = folder / name
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(SecateurError, match=message):
        read_run(folder)


def test_smoothing_keeps_a_constant_and_never_leaves_the_range() -> None:
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200, abs=1e-12)
    values = [float(i % 7) for i in range(400)]
    assert all(0 <= value <= 6 for value in smooth(values))
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


def test_layers_are_in_order_whatever_the_order_in_the_files(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 2], [3, 4, 5]])
    for name, at in (("run.json", ("model", "experts")), ("loads.jsonl", ("layers",))):
        data = part = json.loads((folder / name).read_text())
        for key in at[:-1]:
            part = part[key]
        part[at[-1]] = dict(reversed(part[at[-1]].items()))
        (folder / name).write_text(json.dumps(data) + "\n")
    run = read_run(folder)
    assert list(run.model.experts.items()) == [(0, 2), (1, 3)]
    assert list(run.windows[0].layers.items()) == [(0, (1, 2)), (1, (3, 4, 5))]


def test_numbers_that_are_not_finite_are_none(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", [[1, 2]])
    point = {"kind": "train", "step": 5, "tokens": 50, "loss": math.inf, "load_max_over_mean": 1.5, "phase": "stable"}
    (folder / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    (train,) = read_run(folder).train
    assert (train.loss, train.load_max_over_mean, train.tokens_per_second) == (None, 1.5, None)


@pytest.mark.parametrize(("value", "shown"), [(0.25, (0.25, False)), (0, None), ("inf", None), (10**400, None)])
def test_a_limit_that_a_goal_came_to_is_shown_where_it_is_a_number(value: object, shown: object) -> None:
    event = two_events()[0] | {"beta": None}
    event["plan"]["details"] = {"layers": {"0": {"alpha": value}}}
    read = PruneEvent.from_json(event)
    assert limit(read, "alpha", 0) == shown
    assert limit(read, "alpha", 1) is None
