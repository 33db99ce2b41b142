"""The benchmark of detectors: its numbers are LAEP's own, and what is stored is what its histories say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import detector
from detector_candidates import CANDIDATES, fixed_fraction, moment, reports, rises
from detector_grid import CHOOSING, JUDGING, SEEDS, SETTINGS
from detector_histories import MOST, STORED, History, joined, load_histories, load_recorded, pack, regret
from secateur.train import phases
from secateur.train.phases import PhaseConstants

HISTORIES = load_histories()
RESULT = STORED / "detector.json"
STORED_RESULT: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"histories": [], "ways": []}


def made(windows: int, setting: int = 0, seed: int = 0) -> History:
    """Loads that roll on for the first eighth of the windows, and then stay."""
    draw = np.random.default_rng(seed)
    skew = np.geomspace(1, 60, 8)
    rows = [np.roll(skew, min(window, windows // 8)) for window in range(windows)]
    loads = np.stack([draw.poisson(100 * np.stack([row, row[::-1]])) for row in rows])
    ones = np.ones(windows)
    return History(
        setting=SETTINGS[setting],
        seed=seed,
        steps=20 * np.arange(1, windows + 1),
        loads=loads,
        learning_rate=ones,
        loss=ones,
        gradient=loads.astype(float),
        margin=np.ones((windows, 2)),
    )


def test_the_design_is_as_it_was_asked_for() -> None:
    assert SEEDS * len(SETTINGS) == 60
    assert len({one.name for one in SETTINGS}) == len(SETTINGS)
    assert [one.half for one in SETTINGS].count(CHOOSING) == [one.half for one in SETTINGS].count(JUDGING)
    for half in (CHOOSING, JUDGING):
        ones = [one for one in SETTINGS if one.half == half]
        assert {one.schedule for one in ones} == {"constant", "cosine", "wsd"}
        assert {one.balance for one in ones} == {"none", "mixtral", "bias"}
        assert {one.tokens for one in ones} == {1024, 4096, 16384}
        assert {one.warmup for one in ones} == {20, 200, 2000}
    assert {one.experts for one in SETTINGS} == {16, 32, 64, 128}


def test_regret_is_that_of_the_detector() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        then, now = draw.integers(1, 9, (2, 3, 13)).astype(float)  # with ties
        expected = np.mean([phases.regret(a.tolist(), b.tolist()) for a, b in zip(then, now, strict=True)])
        assert regret(then, now / now.sum(1, keepdims=True)) == pytest.approx(expected)


def test_a_moment_is_that_of_the_detector() -> None:
    one = made(40)
    history = phases.LoadHistory()
    for window in range(1, 41):
        history.add({layer: row.tolist() for layer, row in enumerate(one.loads[window - 1])}, 1000)
    for window, at in ((40, 40), (40, 20), (40, 33)):
        expected = np.array(list(phases.moment(history, 1000 * at).values()), dtype=float)
        assert np.allclose(moment(one, window, at), expected / expected.sum(1, keepdims=True))


def test_each_way_finds_a_moment_in_loads_that_settle_and_a_fixed_one_is_its_share_of_the_run() -> None:
    one = made(120)
    for candidate in CANDIDATES:
        found = candidate.fires(one, candidate.thresholds[-1])
        assert found is not None, candidate.name
        assert 1 <= found <= 120
    assert fixed_fraction(one, 0.25) == 30


def test_an_outcome_by_hand() -> None:
    ones = [made(60), made(60, seed=1)]
    found = detector.outcome(ones, lambda one: 30 if one.seed else None)
    assert (found.fired, found.fraction, found.in_warmup) == (0.5, 0.75, 0)
    regrets = [detector.regret_at(ones[0], 60), detector.regret_at(ones[1], 30)]
    assert found.regret == pytest.approx(np.mean(regrets))
    assert found.worst == max(regrets)


def test_packed_histories_are_the_recorded_ones_with_windows_joined(tmp_path: Path) -> None:
    long = {"loads": np.arange(2 * (2 * MOST + 3) * 4).reshape(2 * MOST + 3, 2, 4), "loss": np.arange(2 * MOST + 3.0)}
    short = joined(long)
    size = len(long["loads"]) // len(short["loads"])
    assert (size, len(short["loads"])) == (3, (2 * MOST + 3) // 3)
    assert (short["loads"][1] == long["loads"][3:6].sum(0)).all()
    assert short["loss"][1] == 4.0
    one = made(30)
    names = ("steps", "loads", "learning_rate", "loss", "gradient", "margin")
    np.savez_compressed(tmp_path / f"{one.name}.npz", **{name: getattr(one, name) for name in names})  # type: ignore[arg-type]
    pack(load_recorded(tmp_path), tmp_path)
    (again,) = load_histories(tmp_path)
    for name in names:
        assert (getattr(again, name) == getattr(one, name)).all()
    assert again.name == one.name


FIRST_SEED = [told for told in STORED_RESULT["histories"] if told["name"].endswith("-seed0")]


@pytest.mark.parametrize("told", FIRST_SEED, ids=lambda told: told["name"])
def test_the_detector_finds_in_a_stored_history_what_is_told_of_it(told: dict[str, Any]) -> None:
    (one,) = [one for one in HISTORIES if one.name == told["name"]]
    found = reports(one, PhaseConstants())
    window = next((number for number, report in enumerate(found, start=1) if report.stable), None)
    assert told["stable_at"] == (None if window is None else one.step(window))
    assert told["last_phase"] == found[-1].phase
    if window is not None:
        assert not rises(one, window)
        assert one.step(window) > one.setting.warmup
        assert told["regret"] == pytest.approx(detector.regret_at(one, window))


def test_every_stored_history_is_told_of() -> None:
    assert [told["name"] for told in STORED_RESULT["histories"]] == [one.name for one in HISTORIES]
