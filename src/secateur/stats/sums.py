"""Which sums can statistics hold, and how is each measured, merged and checked? A new sum is one row of SUMS.

Legend: T tokens of a call, S token-slots (token and chosen expert), E experts, D model width, F width of an expert.
Symbols: x what an expert is given, a its activations in front of the down projection, f its output before the gate,
g the gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.errors import SecateurError

BYTES = 8  # of a float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What was seen of one call of the experts of a layer.

    Args:
        name: of the experts, for messages.
        outputs: (S, D) f. gates: (S,) float64. experts: (S,) int64, `num_experts` for padding. tokens: (S,) rows of
            `inputs`. inputs: (T, D) x.
        activations: (S, F) a, where the experts' function shows them.
        by_pairs: the experts are called with pairs of token and expert that found a place, each as a token.
    """

    name: str
    num_experts: int
    outputs: Tensor
    gates: Tensor
    experts: Tensor
    tokens: Tensor
    inputs: Tensor
    activations: Tensor | None = None
    by_pairs: bool = False

    @cached_property
    def norms(self) -> Tensor:
        """(S,) ||f||, of narrow outputs in float32."""
        wide = torch.promote_types(self.outputs.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(self.outputs, dim=-1, dtype=wide)
        return norms.double()

    @cached_property
    def gated_inputs(self) -> Tensor:
        """(S, D) g x."""
        return self.inputs.double()[self.tokens] * self.gates[:, None]

    @cached_property
    def neurons(self) -> Tensor:
        """(S, F) a.

        Raises:
            SecateurError: the experts do not show them.
        """
        if self.activations is None:
            raise SecateurError(f"{self.name}: {NO_NEURONS}")
        return self.activations.double()

    @cached_property
    def chosen(self) -> Tensor:
        """(T, E) 1 where the token is routed to the expert; rows of padding are 0.

        Raises:
            SecateurError: one call does not show all experts of a token.
        """
        if self.by_pairs:
            raise SecateurError(f"{self.name}: {ONLY_PAIRS}")
        chosen = self.gates.new_zeros(len(self.inputs), self.num_experts + 1)
        chosen[self.tokens, self.experts] = 1
        return chosen[:, :-1]


ONLY_PAIRS = (
    "called with pairs of token and expert that found a place, so it is not seen which experts a token has together"
)
NO_NEURONS = (
    "the activations in front of the down projection are seen in transformers' grouped_mm and batched_mm experts "
    "functions only; where the family has them, call model.set_experts_implementation('grouped_mm')"
)


@dataclass(frozen=True)
class BySlot:
    """of: (S, ...) numbers of each token-slot, which are merged into the row of its expert."""

    of: Callable[[Seen], Tensor]


@dataclass(frozen=True)
class ByCall:
    """of: what a whole call adds, in the shape of the sum."""

    of: Callable[[Seen], Tensor]


@dataclass(frozen=True)
class ByRouter:
    """of: what a call of the router adds, from its (T, D) input in float64, rows of padding 0."""

    of: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sum:
    """One sum that the statistics of a layer may hold, float64.

    Args:
        axes: a letter for each. Along E it is over the tokens routed to the expert, and 0 where no token came.
        help: what is added up.
        measure: a pure function from what is seen of one call to what that adds.
        merge: torch.add, or torch.maximum of what is never negative.
        signed: whether it may be negative.
        by_default: recorded without being asked for.
    """

    name: str
    axes: str
    help: str
    measure: BySlot | ByCall | ByRouter
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add
    signed: bool = False
    by_default: bool = False

    def check_shape(self, found: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        """Compare a shape with the axes.

        Args:
            found: the tensor, in words. sizes: {axis: its size} as far as they are known; those of new axes are added.

        Raises:
            SecateurError: another number of axes, another size, or an empty axis.
        """
        expected = [str(sizes.get(axis, axis)) for axis in self.axes]
        fits = len(shape) == len(self.axes) and all(shape)
        if not fits or any(sizes.setdefault(axis, size) != size for axis, size in zip(self.axes, shape, strict=True)):
            words = f"({', '.join(expected)}{',' * (len(expected) == 1)})"
            raise SecateurError(f"{self.name} is {found}, expected float64 {words}")

    def reordered(self, value: Tensor, order: Tensor) -> Tensor:
        """`value` under other expert ids along every expert axis, order[new] = old."""
        for dim, axis in enumerate(self.axes):
            if axis == "E":
                value = value.index_select(dim, order)
        return value


def _co_selection(seen: Seen) -> Tensor:
    return seen.chosen.T @ seen.chosen


def _neuron_gram(seen: Seen) -> Tensor:
    parts = (seen.neurons[seen.experts == expert] for expert in range(seen.num_experts))
    return torch.stack([part.T @ part for part in parts])


SUMS: dict[str, Sum] = {
    one.name: one
    for one in (
        Sum(
            name="weight_sum", axes="E", help="g", measure=BySlot(lambda seen: seen.gates), signed=True, by_default=True
        ),
        Sum(name="norm_sum", axes="E", help="‖f‖", measure=BySlot(lambda seen: seen.norms), by_default=True),
        Sum(
            name="norm_square_sum",
            axes="E",
            help="‖f‖²",
            measure=BySlot(lambda seen: seen.norms.square()),
            by_default=True,
        ),
        Sum(
            name="weighted_norm_sum",
            axes="E",
            help="g ‖f‖",
            measure=BySlot(lambda seen: seen.gates * seen.norms),
            signed=True,
            by_default=True,
        ),
        Sum(
            name="max_activation",
            axes="E",
            help="the largest absolute entry of f, not a sum",
            measure=BySlot(lambda seen: torch.maximum(seen.outputs.amax(-1), seen.outputs.amin(-1).neg()).double()),
            merge=torch.maximum,
            by_default=True,
        ),
        Sum(name="output_sum", axes="ED", help="f", measure=BySlot(lambda seen: seen.outputs.double()), signed=True),
        Sum(
            name="output_square_sum",
            axes="ED",
            help="f², entry by entry",
            measure=BySlot(lambda seen: seen.outputs.double().square()),
        ),
        Sum(
            name="input_square_sum",
            axes="ED",
            help="(g x)², entry by entry (arXiv 2410.12013)",
            measure=BySlot(lambda seen: seen.gated_inputs.square()),
        ),
        Sum(
            name="neuron_square_sum",
            axes="EF",
            help="(g a)², entry by entry",
            measure=BySlot(lambda seen: (seen.neurons * seen.gates[:, None]).square()),
        ),
        Sum(
            name="co_selection",
            axes="EE",
            help="tokens for which both experts were chosen",
            measure=ByCall(_co_selection),
        ),
        Sum(
            name="input_gram",
            axes="DD",
            help="x xᵀ over all tokens, x what the router is given",
            measure=ByRouter(lambda tokens: tokens.T @ tokens),
            signed=True,
        ),
        Sum(name="neuron_gram", axes="EFF", help="a aᵀ", measure=ByCall(_neuron_gram), signed=True),
    )
}
DEFAULT_SUMS = tuple(name for name, one in SUMS.items() if one.by_default)


def recorded(asked: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of the sums to record, in the order of the table: those by default and those that are asked for.

    Raises:
        SecateurError: there is no such sum; the message lists what there is.
    """
    asked = tuple(asked)
    for name in asked:
        if name not in SUMS:
            raise SecateurError(f"sum {name!r}: expected one of {', '.join(SUMS)}")
    return tuple(name for name in SUMS if name in DEFAULT_SUMS or name in asked)


def bytes_of(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """What these sums take for one layer, whose axes have these sizes."""
    return sum(BYTES * math.prod(sizes[axis] for axis in SUMS[name].axes) for name in names)
