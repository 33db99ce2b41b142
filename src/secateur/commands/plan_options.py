"""The options of `secateur plan` and `secateur prune` that say which experts go and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.criteria import CRITERIA
from secateur.errors import SecateurError
from secateur.plans import REMOVED

LAEP_HELP = "LAEP's thresholds on the loads, which also decide how many go (2601.14327)"
ALLOCATION_HELP = {
    "uniform": "the same for all layers",
    "global": "different numbers, so that the smallest sum of scores goes, each layer's scores as shares of their sum",
    "laep": "different numbers by LAEP's threshold on the loads, just high enough",
}


def _known(removed: str | None) -> str | None:
    if removed not in (None, *REMOVED):
        raise SecateurError(f"--removed {removed}: expected {' or '.join(REMOVED)}")
    return removed


def _listed(table: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in table.items())


CriterionOption = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        help="Which experts stay, those of the highest score: "
        + _listed({name: criterion.help for name, criterion in CRITERIA.items()} | {"laep": LAEP_HELP})
        + ".",
    ),
]
Pretrained = Annotated[
    Path | None,
    typer.Option(
        "--pretrained",
        help="The folder of the model that this one was fine-tuned from, for the criteria that compare their routers.",
    ),
]
Removed = Annotated[
    str | None,
    typer.Option(
        "--removed",
        callback=_known,
        help="What becomes of a removed expert. reroute (the default): its row of the router goes too, and its tokens "
        "go to the next experts. zero-slot: the router stays as it is, and what it sends there contributes nothing; "
        "such a model carries code of its own.",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="How many stay: a share of the experts (0.75), a number of each layer (48), as many as fit with the rest "
        "of the model in so many bytes (24GB, 22GiB), or a number for every layer (0:48,1:40).",
    ),
]
AllocationOption = Annotated[
    str, typer.Option("--allocation", help=f"How many of each layer. {_listed(ALLOCATION_HELP)}.")
]
ExpertParallel = Annotated[
    int, typer.Option("--ep", min=1, help="Expert-parallel ranks to serve on: every layer's count is a multiple.")
]
MinExperts = Annotated[int, typer.Option("--min-experts", min=1, help="Every layer keeps at least so many.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an earlier result of apply or prune at --out, when the new one is complete."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the criterion random.")]
Protect = Annotated[
    bool | None,
    typer.Option(
        "--protect/--no-protect",
        help="Keep super-experts, whose outputs are so large that dropping one breaks a model, whatever their score. "
        "Left out: wherever the statistics show them.",
    ),
]
