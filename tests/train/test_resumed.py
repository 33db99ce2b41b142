"""What a checkpoint says that it holds is compared with its name, its kind and the training that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from secateur.errors import SecateurError
from secateur.train.resumed import check_like, check_state, fitting


def checkpoint(folder: Path, **changes: Any) -> Path:
    """The folder of a checkpoint after step 2, as the Trainer writes it."""
    (folder / "checkpoint-2").mkdir()
    path = folder / "checkpoint-2" / "trainer_state.json"
    state = TrainerState(global_step=2, max_steps=4, num_train_epochs=1, epoch=0.5, logging_steps=1, eval_steps=1)
    state.save_steps = 1
    state.save_to_json(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder / "checkpoint-2"


def test_the_state_that_the_trainer_writes_is_one(tmp_path: Path) -> None:
    check_state(checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": 3}, "global_step is 3, but the folder is checkpoint-2"),
        ({"of tomorrow": 1}, "'of tomorrow' is unknown to this version of transformers"),
        ({"logging_steps": 0}, "'logging_steps' is 0, expected a number of steps above 0"),
    ],
)
def test_a_state_of_something_else_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=rf"trainer_state\.json: {message}"):
        check_state(checkpoint(tmp_path, **changes))


WANTED = {"steps": 3, "rate": 0.5, "names": ["a"]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1], "found 'list', expected names, rate, steps"),
        ({"steps": 3, "rate": 0.5}, r"found \['rate', 'steps'\], expected names, rate, steps"),
        ({"steps": "3", "rate": 0.5, "names": []}, "steps is '3', expected a int"),
        ({"steps": 3, "rate": 0.5, "names": {}}, "names is {}, expected a list"),
    ],
)
def test_another_state_than_the_training_has_is_named_by_its_first_difference(found: object, message: str) -> None:
    same = {"steps": 4, "rate": 1, "names": []}  # a rate may be a whole number
    assert check_like(Path("x"), same, WANTED) is same
    with pytest.raises(SecateurError, match=f"x: {message}"):
        check_like(Path("x"), found, WANTED)


def test_what_other_libraries_raise_is_one_line_that_names_the_file() -> None:
    message = r"^optimizer: does not fit this model and training.*RuntimeError"
    with pytest.raises(SecateurError, match=message), fitting(Path("optimizer")):
        torch.zeros(2) + torch.zeros(3)
