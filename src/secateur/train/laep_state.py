"""What LAEP keeps over a restart, and whether a model and a schedule are those that it was kept of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.records import Count, Experts, Layer

STATE_VERSION = 2


class LAEPState(msgspec.Struct, frozen=True, kw_only=True):
    """What `LAEP.state_dict` gives; plan, events and watch check their parts themselves."""

    version: Literal[2]
    num_steps: Count
    settings: dict[str, Any]
    watch: dict[str, Any]
    events: list[dict[str, Any]]
    plan: dict[str, Any]
    counts: dict[Layer, Experts]
    checksums: dict[str, int]


def check_state(
    saved: LAEPState, counts: Mapping[int, int], settings: Mapping[str, Any], checksums: Mapping[str, int]
) -> None:
    """Compare a state with the model and the schedule that go on from it.

    Args:
        counts, checksums: of the model's experts; settings: of the schedule, as the state has them.

    Raises:
        SecateurError: the state is of a model with other expert counts or weights, or of another schedule.
    """
    if saved.counts != counts:
        raise SecateurError(
            f"LAEP state is of a model with experts {saved.counts}, this model has {counts}: load the "
            "model from the checkpoint itself (AutoModelForCausalLM.from_pretrained(checkpoint)) before resuming"
        )
    if saved.settings != settings:
        raise SecateurError(f"LAEP state is of a run with other settings: {saved.settings}, this run has {settings}")
    wrong = [name for name, value in saved.checksums.items() if checksums.get(name) != value]
    if wrong:
        raise SecateurError(
            f"{len(wrong)} expert tensors, e.g. {wrong[0]}, are not those of the moment this LAEP state was taken. "
            "Trainer does not load experts that a checkpoint stores one by one: load the model from the checkpoint "
            "itself (AutoModelForCausalLM.from_pretrained(checkpoint)) before resuming"
        )
