"""Layers that predict further tokens (multi-token prediction), where they are pruned with the others."""

from __future__ import annotations

from secateur.criteria.score import find_criterion
from secateur.errors import SecateurError
from secateur.model_folder.choice import Choice, who_needs_data
from secateur.model_folder.source import Source
from secateur.plans import ZERO_SLOT

PRUNE = "prune"  # what --mtp says then; the plan names these layers, and `apply` is told nothing


def check_mtp(source: Source, choice: Choice) -> None:
    """Refuse what cannot decide on layers that predict further tokens (MTP); for --mtp prune.

    Raises:
        SecateurError: it needs statistics of them, and no model class of transformers runs them; it compares the
            decoder layers of two models; it gives layers different numbers, or leaves zero slots.
    """
    if source.found is not None and not source.found.mtp_counts:
        return
    what = None
    if source.found is None or choice.needs_data:
        who = "the statistics are" if source.found is None else f"{who_needs_data(choice)} needs statistics that are"
        what = f"{who} of the decoder layers alone: no model class of transformers runs the others"
    elif find_criterion(choice.criterion).needs == "router change":
        what = f"criterion {choice.criterion!r} compares the decoder layers of two models"
    elif choice.allocation != "uniform":
        what = f"--allocation {choice.allocation} gives layers different numbers, and config.json says one for these"
    elif choice.removed == ZERO_SLOT:
        what = "transformers has no code for zero slots in them"
    if what is not None:
        raise SecateurError(
            f"--mtp {PRUNE}: {what}; expected a criterion that reads weights, such as aimer, with one number for all "
            "layers, or another value of --mtp"
        )
