"""Can this be the plan of a layer? Whole numbers, ids that are there, weights and neurons that fit."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from secateur.errors import SecateurError
from secateur.files.limits import MAX_EXPERTS, MAX_LAYER
from secateur.plans.arrays import Matrix, Neurons
from secateur.plans.layer import LayerPlan, Source, place_in_entry, total_of, unless_all, without_copies

# What is solved for: the matrix `down_proj` of the new expert 3, say, or the whole router.
SOLVED = re.compile(r"(?:(?P<new>0|[1-9]\d*)\.[a-z_]+|router)")
ROUNDING = 1e-6  # of the sum of an entry's weights, such as those of a softmax in float32
EXACT = 1e-12  # a sum that is nearer to 1 is left as it is


def layer_id(value: Any) -> int:
    """A layer id as a plain whole number.

    Raises:
        SecateurError: it is none, or below 0.
    """
    layer = _index(value, "plan: a layer id")
    if not 0 <= layer <= MAX_LAYER:
        raise SecateurError(f"plan: layer id is {layer}, expected 0 or more, and at most {MAX_LAYER}")
    return layer


def checked_layer(layer: Any, plan: LayerPlan, *, weights_are_free: bool = False) -> LayerPlan:
    """The plan of a layer with plain whole numbers, sources in one order, and no source list for what is a copy.

    Args:
        layer: its id, for messages. weights_are_free: whether weights may be below 0 or sum up to something but 1.

    Raises:
        SecateurError: an id out of range or listed twice, no expert, sources that do not fit; the message names it.
    """
    where = f"plan, layer {layer}"
    if not isinstance(plan.order, list | tuple) or not all(
        isinstance(part, Mapping) for part in (plan.sources, plan.solved)
    ):
        raise SecateurError(f"{where}: found {plan!r:.200}, expected a list in order, mappings in sources and solved")
    before = _index(plan.experts_before, f"{where}: experts_before")
    if before > MAX_EXPERTS:
        raise SecateurError(f"{where}: experts_before is {before}, expected at most {MAX_EXPERTS}")
    order = tuple(_index(old, f"{where}: an expert id in order") for old in plan.order)
    if not order:
        raise SecateurError(f"{where}: no expert is kept, expected at least one")
    _check_ids(where, order, before)
    if twice := sorted(old for old, times in Counter(order).items() if times > 1):
        raise SecateurError(f"{where}: expert ids {twice!r:.200} are listed more than once, expected once")
    width = None if plan.width_before is None else _index(plan.width_before, f"{where}: width_before")
    if width is not None and width < 1:
        raise SecateurError(f"{where}: width_before is {width}, expected 1 or more")
    sources = {}
    for new, entry in plan.sources.items():
        number = _index(new, f"{where}: a new expert in sources")
        here = f"{where}, new expert {number}"
        if not 0 <= number < len(order):
            raise SecateurError(f"{here}: it is in sources, expected one from 0 to {len(order) - 1}")
        sources[number] = _checked_entry(here, entry, order[number], before, width, weights_are_free)
    tidy = LayerPlan(
        experts_before=before, order=order, sources=dict(sorted(sources.items())), width_before=width,
        solved=dict(sorted(plan.solved.items(), key=lambda item: str(item[0]))),
    )  # fmt: skip
    _check_widths(where, tidy)
    _check_solved(where, tidy)
    return without_copies(tidy)


def _checked_entry(
    where: str, entry: Any, representative: int, before: int, width: int | None, weights_are_free: bool
) -> tuple[Source, ...]:
    if not isinstance(entry, list | tuple) or not entry or not all(isinstance(source, Source) for source in entry):
        raise SecateurError(f"{where}: its sources are {entry!r:.200}, expected Source values, at least one")
    experts = [_index(source.expert, f"{where}: a source") for source in entry]
    _check_ids(where, experts, before)
    if representative not in experts:
        raise SecateurError(
            f"{where}: it takes the place of expert {representative}, which is not among its sources {experts!r:.200}"
        )
    weights = [_number(source.weight, f"{where}: a weight") for source in entry]
    if not weights_are_free:
        weights = _convex(where, weights)
    for neurons in (source.neurons for source in entry if source.neurons is not None):
        if not isinstance(neurons, Neurons):
            raise SecateurError(f"{where}: neurons are {neurons!r:.200}, expected Neurons")
        if width is None:
            raise SecateurError(f"{where}: a source lists neurons, but width_before does not say of how many")
        if neurons.largest >= width:
            raise SecateurError(f"{where}: neuron {neurons.largest} is out of range, expected 0 to {width - 1}")
    tidy = sorted(
        (
            Source(expert=expert, weight=weight, neurons=unless_all(source.neurons, width))
            for expert, weight, source in zip(experts, weights, entry, strict=True)
        ),
        key=place_in_entry,
    )
    for one, other in itertools.pairwise(tidy):
        if place_in_entry(one) == place_in_entry(other):
            raise SecateurError(f"{where}: expert {one.expert} is listed twice with the same neurons, expected once")
    return tuple(tidy)


def _convex(where: str, weights: list[float]) -> list[float]:
    """The weights, summing up to 1 to the last digits."""
    total = total_of(weights)
    if min(weights) < 0 or abs(total - 1) > ROUNDING:
        raise SecateurError(
            f"{where}: weights {weights!r:.200} sum up to {total}, expected 1 and none below 0, or a plan that says "
            'weights="free"'
        )
    return weights if abs(total - 1) <= EXACT else [weight / total for weight in weights]


def _check_widths(where: str, plan: LayerPlan) -> None:
    """All new experts of a layer must have one number of neurons: they share tensors."""
    widths = {
        new: {plan.width_before if source.neurons is None else len(source.neurons) for source in plan.made_of(new)}
        for new in range(plan.experts_after)
    }
    found = set[int | None]().union(*widths.values())
    if len(found) > 1:
        raise SecateurError(f"{where}: new experts of {sorted(map(str, found))} neurons, expected one number for all")


def _check_solved(where: str, plan: LayerPlan) -> None:
    for name, matrix in plan.solved.items():
        match = SOLVED.fullmatch(name) if isinstance(name, str) else None
        if match is None or (match["new"] is not None and int(match["new"]) >= plan.experts_after):
            raise SecateurError(
                f"{where}: solved for {name!r:.100}, expected 'router', or NEW.NAME of a matrix of a new expert from 0 "
                f"to {plan.experts_after - 1}"
            )
        if not isinstance(matrix, Matrix):
            raise SecateurError(f"{where}: solved for {name}: found {matrix!r:.100}, expected a Matrix")


def _check_ids(where: str, ids: Iterable[int], before: int) -> None:
    if outside := sorted({old for old in ids if not 0 <= old < before}):
        raise SecateurError(f"{where}: expert ids {outside!r:.200} are out of range, expected 0 to {before - 1}")


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number + 0.0  # no zero below 0
    except OverflowError:
        pass
    raise SecateurError(f"{name} is {value!r:.100}, expected a finite number")


def _index(value: Any, name: str) -> int:
    """`value` as int when it is one (also from torch or numpy); no bool, no float, no text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise SecateurError(f"{name} is {value!r}, expected an integer") from None
