"""What an observation on text takes and refuses before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.data.calibration import Calibration
from secateur.errors import SecateurError
from secateur.model_folder.measure import on_text
from secateur.model_folder.measure.on_text import TextObservation
from secateur.model_folder.read import load
from support.model_folders import saved
from support.streamed_runs import found_in, random_data
from support.tiny_models import VOCABULARY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved("mixtral", folder)
    return folder


def data_of(*ids: int) -> Calibration:
    return Calibration(
        sequences=(torch.tensor(ids, dtype=torch.int32),), packed=True, domains={"one": 1}, about={"seed": 0}
    )


def test_the_last_token_of_the_vocabulary_is_known_and_the_one_after_it_is_not(model: Path, tmp_path: Path) -> None:
    TextObservation(found_in(model), data_of(0, VOCABULARY - 1), tmp_path / "stats")
    with pytest.raises(
        SecateurError, match=rf"{model}: it makes a token of id {VOCABULARY}, but its vocabulary is {VOCABULARY} "
    ):
        TextObservation(found_in(model), data_of(0, VOCABULARY), tmp_path / "stats")


def test_a_sequence_may_be_as_long_as_the_model_takes_and_no_longer(model: Path, tmp_path: Path) -> None:
    TextObservation(found_in(model), data_of(*[1] * 64), tmp_path / "stats")
    with pytest.raises(SecateurError, match=r"sequences of 65 tokens, but the model takes at most 64"):
        TextObservation(found_in(model), data_of(*[1] * 65), tmp_path / "stats")


def test_auto_keeps_small_states_of_a_model_that_fits_in_memory_and_no_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = 5 * 12 * 32 * 4  # sequences, tokens of each, width, bytes of a float32

    def found(activations: on_text.Activations = "auto") -> tuple[int, bool]:
        costs = TextObservation(found_in(model), random_data(), tmp_path / "stats", activations=activations).costs
        return costs.hidden_bytes, costs.in_memory

    monkeypatch.setattr(on_text, "SMALL", hidden)
    assert found() == (hidden, True)
    monkeypatch.setattr(on_text, "SMALL", hidden - 1)
    assert [found(), found("memory"), found("disk")] == [(hidden, False), (hidden, True), (hidden, False)]
    monkeypatch.setattr(on_text, "SMALL", hidden)
    monkeypatch.setattr(load, "free_memory", lambda: 1)
    assert found() == (hidden, False)
