"""How is each expert of a layer scored? One function a criterion.

Each takes the statistics or the weights of one layer and knows no model family.

To add one: a function in `activation.py`, `weights.py` or `router_change.py`, and one line in CRITERIA under the
function's name. The command line, the tests and the table of docs/prune.md (`make docs-tables`) read it. Importing
it loads no torch, so that `--help` stays quick.
(LAEP's rule, in `decide/laep_rule.py`, is not a score: its thresholds also decide how many experts go.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Needs = tuple[str, ...] | Literal["expert weights", "router weights", "router change", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The power of c that scores are multiplied by when one thing is multiplied by c, for all tokens and experts.

    Args:
        outputs, gates: of the experts. inputs: what the experts and the router are given. neurons: what the down
            projections are given. tokens: how often each token is seen.
    """

    outputs: int = 0
    gates: int = 0
    inputs: int = 0
    neurons: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way to score the experts of a layer; a score is float64, finite, and higher = keep.

    Args:
        name: of its function, and on the command line.
        home: the module of `secateur.criteria` that defines the function.
        needs: token_count and names in `stats.SUMS`, which a pass over data must have filled, or what it reads instead
            of data.
        source: arXiv id, or why there is none.
        help: one line.
        degrees: of a criterion on data, which the tests hold it to.
    """

    name: str
    home: str
    needs: Needs
    source: str
    help: str
    degrees: Degrees | None = None

    @property
    def needs_data(self) -> bool:
        return isinstance(self.needs, tuple)

    @property
    def sums(self) -> tuple[str, ...]:
        """The sums that it reads, by their names in `stats.SUMS`."""
        return tuple(name for name in self.needs if name != "token_count") if isinstance(self.needs, tuple) else ()

    @property
    def function(self) -> Callable[..., Any]:
        """(LayerStats | WeightStats | RouterChange) -> (E,), or (E, seed=, layer=) -> (E,), by what it needs."""
        function: Callable[..., Any] = getattr(importlib.import_module(f"secateur.criteria.{self.home}"), self.name)
        return function


def _activation(name: str, source: str, needs: str, text: str, **degrees: int) -> Criterion:
    """needs: names, which spaces separate. degrees: see `Degrees`."""
    return Criterion(
        name=name,
        home="activation",
        needs=tuple(needs.split()),
        source=source,
        help=text,
        degrees=Degrees(**degrees),
    )


def _weights(name: str, source: str, needs: Any, text: str) -> Criterion:
    return Criterion(name=name, home="weights", needs=needs, source=source, help=text)


def _change(name: str, source: str, text: str) -> Criterion:
    return Criterion(name=name, home="router_change", needs="router change", source=source, help=text)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        _activation("frequency", "2404.05089", "token_count", "how many tokens are routed to the expert", tokens=1),
        _activation("soft_frequency", "2404.05089", "weight_sum", "the sum of its gates", gates=1, tokens=1),
        _activation("ean", "2504.05586", "norm_sum", "the sum of its output norms", outputs=1, tokens=1),
        _activation("man", "2606.15716", "norm_sum", "its mean output norm", outputs=1),
        _activation("msan", "2606.15716", "norm_square_sum", "its mean squared output norm", outputs=2),
        _activation(
            "weighted_ean",
            "2510.13999",
            "weighted_norm_sum",
            "the sum of its gates times output norms",
            outputs=1,
            gates=1,
            tokens=1,
        ),
        _activation("reap", "2510.13999", "weighted_norm_sum", "its mean gate times output norm", outputs=1, gates=1),
        _weights("aimer", "2603.18492", "expert weights", "how unequal the magnitudes of its weights are"),
        _weights("weight_norm", "plain baseline", "expert weights", "the norm of its weights"),
        _weights("router_row_norm", "2405.16646, surrogate", "router weights", "the norm of its router row"),
        _change("router_norm_change", "2405.16646", "how much fine-tuning lengthened its router row"),
        _change("router_norm_absolute_change", "option to compare", "how much its router row's norm changed"),
        _change("router_difference_norm", "option to compare", "how far its router row moved"),
        _weights("random", "control", "nothing", "random numbers from a seed"),
    )
}
