"""A replay finds what the run itself found, and says what it cannot know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError
from secateur.pretraining import run as program
from secateur.pretraining.run import run_pretraining
from secateur.replay.phases import why
from support.small_runs import LOOSE, corpus_in, light_report, options, strict

THEN, NOW = [5, 40, 10, 300, 20, 80, 35, 510], [100, 10, 50, 300, 20, 80, 35, 405]
KNOWN: dict[str, Any] = {"max_regret": 0.051, "min_windows": 5}
LATE: dict[str, Any] = {"step": 40, "tokens": 2000, "layers": {"0": NOW}}
Window = Mapping[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned at the stable phase, with experts rearranged before, between and after."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    settings = {"steps": 40, "warmup_steps": 10, "window_steps": 2, "rearrange_ranks": 2, "rearrange_every": 5}
    constants = LOOSE | {"max_regret": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "write_report", light_report)
        run_pretraining(options(corpus_in(tmp_path_factory), **settings, **constants), folder)
    return folder


# Of 20 windows, the first four have the loads THEN: at window 10 the mean regret is (6 x 0.12 + 2 x 0.04) / 16 = 0.05,
# at window 9 it is 0.065.
def windows(loads: Sequence[Sequence[int]], steps: int = 20, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": steps * number, "tokens": 1000 * number, "layers": {"0": list(one)}} | more
        for number, one in enumerate(loads, start=1)
    ]


def written(folder: Path, lines: Sequence[Window]) -> Path:
    path = folder / "loads.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_replay_of_a_run_finds_the_phases_of_the_run(run: Path) -> None:
    recorded = [json.loads(line) for line in (run / "loads.jsonl").read_text().splitlines()]
    found = secateur.phases(run, **LOOSE | {"max_regret": 0.05})
    assert {"begin", "warm-up", "stable"} <= {line["phase"] for line in recorded}
    for line, window in zip(recorded, found.to_json()["windows"], strict=True):
        assert {name: line[name] for name in window} == window
    events = strict(run / "events.json")
    (pruned,) = [event["step"] for event in events if event["reason"] == "stable"]
    assert len(events) > 2
    assert found.stable_at == pruned
    assert found.regret_at_end is None, "the experts of then are not there any more"


def test_other_constants_find_another_step(run: Path) -> None:
    assert secateur.phases(run, min_change=1.0).stable_at is None
    late = secateur.phases(run, **LOOSE, warmup_steps=30)
    assert late.stable_at is None or late.stable_at >= 30


def test_lines_of_another_framework_are_replayed_and_hindsight_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, windows([*[THEN] * 4, *[NOW] * 16]))
    found = secateur.phases(path, **KNOWN)
    assert [(one.report.phase, one.first_step, one.last_step) for one in found.stretches] == [
        ("begin", 0, 80),
        ("unknown", 80, 100),
        ("moving", 100, 180),
        ("stable", 180, 400),
    ]
    assert (found.stable_at, found.share) == (200, 0.5)
    assert found.regret_at_end == 0.0
    assert found.notes == (
        "no learning rate is recorded: a warm-up is not seen; tell of it by the steps that it takes",
    )
    assert why(found).startswith("stable at step 200, after 50% of the run. The choice of then has 0.00% regret")
    assert why(secateur.phases(path, **KNOWN, min_change=1.0)) == (
        "not stable in 400 steps: unlearned, change 14% (min_change 100%). "
        "Before: begin for 80 steps, unknown for 20 steps, moving for 80 steps, unlearned for 220 steps."
    )


def test_a_longer_run_than_was_recorded_asks_more_of_a_choice(tmp_path: Path) -> None:
    path = written(tmp_path, windows([*[THEN] * 4, *[NOW] * 16]))
    assert secateur.phases(path, **KNOWN, steps=800).stable_at == 280
    with pytest.raises(SecateurError, match="steps is 399, expected at least the 400 that were recorded"):
        secateur.phases(path, steps=399)
    told = [line | {"ahead": 1.0} for line in windows([*[THEN] * 4, *[NOW] * 16])]
    assert secateur.phases(written(tmp_path, told), **KNOWN, steps=800).stable_at == 200, "what the run knew holds"


def test_a_warm_up_is_seen_in_the_rates_or_told(tmp_path: Path) -> None:
    lines = windows([*[THEN] * 4, *[NOW] * 16])
    rising = [line | {"learning_rate": min(line["step"], 300)} for line in lines]
    assert secateur.phases(written(tmp_path, rising), **KNOWN).stable_at == 320
    assert secateur.phases(written(tmp_path, rising)).notes == ()
    assert secateur.phases(written(tmp_path, lines), **KNOWN, warmup_steps=250).stable_at == 260


def test_gaps_and_other_expert_counts_are_said(tmp_path: Path) -> None:
    lines = windows([*[THEN] * 4, *[NOW] * 16])
    gap = secateur.phases(written(tmp_path, lines[:6] + lines[9:])).notes
    assert "1 gaps: windows have 20 steps, but between the steps 120 and 200 there is one for 80" in gap[0]
    fewer = lines[:12] + [line | {"layers": {"0": NOW[:6]}} for line in lines[12:]]
    found = secateur.phases(written(tmp_path, fewer))
    assert "step 260: the experts are other ones than before (layer 0: 8 -> 6)" in found.notes
    assert found.to_json()["windows"][12]["phase"] == "begin"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no window in it"),
        ([{"step": 1}], ":1: 'tokens' is missing"),
        ([*windows([THEN]), LATE | {"tokens": 1000}], ":2: 'tokens' is 1000, expected more"),
        ([*windows([THEN]), LATE | {"layers": {"1": NOW}}], r":2: found the layers \[1\], expected \[0\]"),
        (windows([THEN, [0] * 8]), ":2: window, layer 0: no token was routed"),
        (windows([THEN], learning_rate="high"), ":1: 'learning_rate' is 'high', expected a finite number or null"),
    ],
)
def test_a_history_that_cannot_be_is_refused_by_its_line(tmp_path: Path, lines: list[Window], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        secateur.phases(written(tmp_path, lines))


def test_a_missing_history_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"no loads.jsonl in it, expected the folder of a run or a file"):
        secateur.phases(tmp_path)
    with pytest.raises(SecateurError, match="no such file"):
        secateur.phases(tmp_path / "nothing")
    with pytest.raises(SecateurError, match="max_regret is 2"):
        secateur.phases(tmp_path, max_regret=2.0)
