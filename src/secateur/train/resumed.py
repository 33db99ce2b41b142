"""Is what a checkpoint holds what training writes? Asked before the Trainer reads it, which trusts all of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from transformers import TrainerState

from secateur.errors import SecateurError, foreign
from secateur.files.archive import load_plain
from secateur.files.json import read_object
from secateur.files.limits import MAX_FLOAT
from secateur.files.opened import opened
from secateur.files.records import Count, Finite, as_record
from secateur.train.checkpoints import step_of
from secateur.train.distributed import launch

STATE = "trainer_state.json"
Steps = Annotated[float, msgspec.Meta(gt=0, le=MAX_FLOAT, description="a number of steps above 0")]


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """What the Trainer logged at a step; callbacks add what they like."""

    step: Count
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None


class StateFile(msgspec.Struct, frozen=True, kw_only=True):
    """trainer_state.json: what the Trainer counts. Another version of transformers may have further keys."""

    global_step: Count
    max_steps: Count
    num_train_epochs: Count
    epoch: Finite
    log_history: list[Logged]
    stateful_callbacks: dict[str, Any]
    logging_steps: Steps
    eval_steps: Steps
    save_steps: Steps
    total_flos: Finite = 0.0
    num_input_tokens_seen: Count = 0
    train_batch_size: Count | None = None
    best_metric: float | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    trial_name: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False


def check_state(checkpoint: Path) -> None:
    """See that the Trainer can go on from what it counted.

    Raises:
        SecateurError: its file is missing, damaged, of another step, or of another version of transformers.
    """
    path = checkpoint / STATE
    content = read_object(path)
    state = as_record(content, StateFile, str(path))
    if unknown := sorted(content.keys() - {field.name for field in dataclasses.fields(TrainerState)}):
        raise SecateurError(f"{path}: {unknown[0]!r:.80} is unknown to this version of transformers")
    if state.global_step != step_of(checkpoint):
        raise SecateurError(f"{path}: global_step is {state.global_step}, but the folder is {checkpoint.name}")


def read_plain(path: Path) -> Any:
    """Tensors and plain values of a file beside the weights; raises SecateurError as `load_plain`."""
    with opened(path) as file:
        return load_plain(file, str(path))


def check_like(path: Path, found: object, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """`found`, if it has the keys of `wanted`, with values of the same types.

    Raises:
        SecateurError: names the file and the first key that differs.
    """
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        keys = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise SecateurError(f"{path}: found {keys!r:.200}, expected {', '.join(sorted(wanted))}")
    for key, value in wanted.items():
        numbers = isinstance(value, int | float) and isinstance(found[key], int | float)
        if type(found[key]) is not type(value) and not numbers:
            raise SecateurError(f"{path}: {key} is {found[key]!r:.60}, expected a {type(value).__name__}")
    return found


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Make one line of whatever torch and transformers raise at a file that was not written for this training.

    Only around code of theirs that reads it.

    Raises:
        SecateurError: names the file.
    """
    try:
        yield
    except Exception as error:
        if launch.has_lost_contact(error):
            raise
        with foreign(f"{path}: does not fit this model and training"):
            raise
