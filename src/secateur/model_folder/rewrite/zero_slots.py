"""Which model folders can have experts removed into zero slots, see `secateur.modeling_secateur`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.plans import REROUTE, ZERO_SLOT, Plan


def check_removal(folder: ModelFolder, plan: Plan, *, expert_parallel: int = 1) -> None:
    """Compare what a plan means by removing an expert with what the model can have.

    Raises:
        SecateurError: rows would be cut of routers with zero slots; or zero slots in a quantised model, in layers that
            predict further tokens, or for expert-parallel ranks.
    """
    if not plan.leaves_zero_slots:
        check_no_zero_slots(folder, f"the plan would cut rows of them; say --removed {ZERO_SLOT}")
        return
    where = f"{folder.files.path}: zero slots"
    if folder.files.is_quantised:
        raise SecateurError(
            f"{where}: the model is quantised, and transformers then computes experts by code of its own"
        )
    named = sorted(folder.mtp_counts.keys() & plan.layers.keys())
    if named:
        raise SecateurError(
            f"{where}: layers {named} predict further tokens (MTP), and transformers has no code for them"
        )
    if expert_parallel > 1:
        raise SecateurError(f"{where}: such experts are not split over ranks, found --ep {expert_parallel}")


def check_no_zero_slots(folder: ModelFolder, why: str) -> None:
    """Refuse a model with zero slots; `why` ends the sentence.

    Raises:
        SecateurError: it has some.
    """
    if folder.config.kept:
        raise SecateurError(
            f"{folder.files.path}: its routers have zero slots, and {why}, or take the model that it was made from (an "
            f"undo folder restores it), where --removed {REROUTE} is the default"
        )


def check_buildable(folder: ModelFolder, config: Mapping[str, Any]) -> None:
    """Build the model that a config.json with zero slots describes, without weights.

    Raises:
        SecateurError: it cannot be; its experts run on every token, for example.
    """
    import torch

    from secateur.model_folder.read.config import floats
    from secateur.modeling_secateur import pruned_model_class, read_pruned_config
    from secateur.surgery.config_json import is_pruned

    if not is_pruned(config):
        return
    try:
        with torch.device("meta"):
            pruned_model_class(folder.config.model_class)(read_pruned_config(floats(dict(config))))
    except Exception as error:  # transformers has no error of its own for a config it cannot use
        message = f"{folder.files.path}: a {folder.config.model_type!r} model with zero slots cannot be built ({error})"
        raise SecateurError(f"{message:.400}") from error


def kept_slots(folder: ModelFolder, plan: Plan) -> dict[int, tuple[int, ...]]:
    """{layer: slots whose experts it holds} after a plan that leaves zero slots."""
    from secateur.surgery.zero_slots import kept_after

    layers = {layer: layer_plan for layer, layer_plan in plan.layers.items() if layer in folder.counts}
    return kept_after(folder.slots, folder.config.kept, layers)
