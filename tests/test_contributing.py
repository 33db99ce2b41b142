"""CONTRIBUTING.md is true: each part is added by exactly its steps, tested by its commands, and fails as it says."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path

import pytest

from secateur.criteria import CRITERIA
from support.small_runs import in_child
from support.toy_house import ROOT, Addition, additions, apply, copied_house, run_commands

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDITIONS = additions(PAGE)
# the edits that an addition takes, in the source and in the tests
EDITS = {"a criterion": 3, "a pruning rule": 2, "a family": 1, "an optimizer rule": 3}
# what is left out of an addition, or spelled wrongly in it -> the failure that the page shows
MISTAKES = {
    "a criterion": ('"weighted_norm_sum gated_output_sum"', '"weighted_norm_sum"'),
    "a pruning rule": ('decides="drop_count"', 'decides="drop_cuont"'),
    "a family": (", tensors=_BIASED", ""),
    "an optimizer rule": (', "exp_inf": LIKE_PARAMETER', ""),
}


def test_the_page_shows_how_to_add_each_part_in_few_edits() -> None:
    assert {title: len(addition.changes) for title, addition in ADDITIONS.items()} == EDITS
    assert all(len(addition.commands) == 1 and len(addition.failures) == 1 for addition in ADDITIONS.values())


def run_and_ask(house: Path, commands: tuple[str, ...], log: Path) -> None:
    """Run the commands; then let the rule of the toy house, if it has one, drop two experts a layer."""
    run_commands(house, commands, log)
    ways = importlib.import_module("support.rule_ways")
    with contextlib.suppress(AttributeError):  # where its function is spelled wrongly
        (house / "plan.json").write_text(json.dumps(ways.plan(house, "drop_count", 2)))


def result_of(house: Path, chosen: dict[str, Addition], log: Path) -> dict[str, str]:
    """What the command of each addition prints, in a house with all of them."""
    for addition in chosen.values():
        for change in addition.changes:
            apply(change, house)
    commands = tuple(command for addition in chosen.values() for command in addition.commands)
    assert in_child(run_and_ask, house, commands, log) == 0, log.read_text()
    printed = log.read_text().split("$ ")[1:]
    return dict(zip(chosen, printed, strict=True))


@pytest.mark.process
@pytest.mark.slow
def test_a_toy_of_each_part_passes_the_conformance_tests(tmp_path: Path) -> None:
    house = copied_house(tmp_path / "house")
    for title, text in result_of(house, ADDITIONS, tmp_path / "log").items():
        assert text.endswith("exit 0\n"), f"{title}:\n{text}"
    layers = json.loads((house / "plan.json").read_text())["layers"]
    assert {layer: one["order"] for layer, one in layers.items()} == {"0": [2, 3], "3": [0, 1]}


@pytest.mark.process
@pytest.mark.slow
def test_what_is_forgotten_fails_as_the_page_says(tmp_path: Path) -> None:
    house, wrong = copied_house(tmp_path / "house"), {}
    for title, (right, mistake) in MISTAKES.items():
        changes = [
            type(change)(path=change.path, before=change.before, after=change.after.replace(right, mistake))
            for change in ADDITIONS[title].changes
        ]
        assert tuple(changes) != ADDITIONS[title].changes
        wrong[title] = Addition(changes=tuple(changes), commands=ADDITIONS[title].commands, failures=())
    for title, text in result_of(house, wrong, tmp_path / "log").items():
        assert text.endswith("exit 1\n"), f"{title}:\n{text}"
        assert ADDITIONS[title].failures[0].strip() in text, f"{title}:\n{text}"


def test_every_criterion_was_compared_with_random_and_frequency() -> None:
    text, tuned = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("criteria", "router_change_text")
    )
    comparisons = [model["results"] for model in text["models"].values()] + [tuned["runs"]]
    names = [{one["criterion"] for one in comparison} for comparison in comparisons]
    assert all({"random", "frequency"} <= found for found in names)
    assert set().union(*names) >= set(CRITERIA), "run benchmarks/criteria.py TEXT --work WORK --store"
