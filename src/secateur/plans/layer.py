"""What each new expert of one layer is made of: old experts, weighted, with neurons taken or re-ordered."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from secateur.errors import SecateurError
from secateur.files.limits import MAX_EXPERTS, MAX_LAYER
from secateur.plans.arrays import Matrix, Neurons

# What is solved for: the matrix `down_proj` of the new expert 3, say, or the whole router.
SOLVED = re.compile(r"(?:(?P<new>0|[1-9]\d*)\.[a-z_]+|router)")
ROUNDING = 1e-6  # of the sum of an entry's weights, such as those of a softmax in float32
EXACT = 1e-12  # a sum that is nearer to 1 is left as it is


@dataclass(frozen=True, kw_only=True)
class Source:
    """An old expert in a new one: all its weights times `weight`, of its neurons those in `neurons` (None: all)."""

    expert: int
    weight: float = 1.0
    neurons: Neurons | None = None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The new experts of one layer. `Plan` checks it.

    Args:
        experts_before: E; old ids are from 0 to E - 1.
        order: `order[new] = old`: the old expert whose slot, router row and place the new one takes; of several that
            were merged, the one that represents them.
        sources: {new: what it is made of}, for the new experts that are more than a copy of `order[new]`, which is then
            among its own sources. An old expert may be in several entries, and in one entry several times with other
            neurons.
        width_before: F, neurons of an old expert, where a source lists neurons. All new experts have the same number.
        solved: {name: matrix} that stand in the place of what the sources give: "NEW.NAME" for a matrix of a new
            expert, "router" for the router's.
    """

    experts_before: int
    order: tuple[int, ...]
    sources: Mapping[int, tuple[Source, ...]] = field(default_factory=dict, hash=False)
    width_before: int | None = None
    solved: Mapping[str, Matrix] = field(default_factory=dict, hash=False)

    @classmethod
    def identity(cls, num_experts: int) -> LayerPlan:
        """Every expert stays where it is."""
        return cls(experts_before=num_experts, order=tuple(range(num_experts)))

    @property
    def experts_after(self) -> int:
        return len(self.order)

    @property
    def width_after(self) -> int | None:
        """F', neurons of a new expert; None where the plan lists no neurons."""
        return next((len(source.neurons) for source in self._listed() if source.neurons), self.width_before)

    @property
    def gone(self) -> tuple[int, ...]:
        """Old ids whose slot no new expert takes, ascending: the dropped and the absorbed ones."""
        kept = set(self.order)
        return tuple(old for old in range(self.experts_before) if old not in kept)

    @property
    def absorbed(self) -> tuple[int, ...]:
        """Old ids that are in a new expert but give it neither slot nor place, ascending."""
        return tuple(old for old in self.gone if old in self._used)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Old ids that no new expert is made of, ascending."""
        return tuple(old for old in self.gone if old not in self._used)

    @property
    def is_ascending(self) -> bool:
        """True when the kept experts stay in their old relative order."""
        return all(left < right for left, right in itertools.pairwise(self.order))

    @property
    def is_copy(self) -> bool:
        """True when every new expert is one old expert as it was."""
        return not self.sources and not self.solved

    @property
    def merges(self) -> bool:
        """True when a new expert is made of several old ones."""
        return any(len({source.expert for source in entry}) > 1 for entry in self.sources.values())

    @property
    def is_identity(self) -> bool:
        """True when every expert stays where it is, as it was."""
        return self.is_copy and self.order == tuple(range(self.experts_before))

    def made_of(self, new: int) -> tuple[Source, ...]:
        """The sources of a new expert; of a copy, the one it is a copy of."""
        return self.sources.get(new) or (Source(expert=self.order[new]),)

    def then(self, later: LayerPlan) -> LayerPlan:
        """This plan, then `later` on its result: of each new expert the sources of its sources, weights multiplied.

        Raises:
            SecateurError: `later` starts from other experts or neurons than this one leaves, or matrices were solved
                for, which hold for the experts at hand alone.
        """
        if self.solved or later.solved:
            name = next(iter(self.solved or later.solved))
            raise SecateurError(f"{name} was solved for the experts at hand; apply the plans one after another")
        if self.experts_after != later.experts_before:
            raise SecateurError(
                f"the later plan starts from {later.experts_before} experts, "
                f"but the earlier one leaves {self.experts_after}"
            )
        if None not in (self.width_after, later.width_before) and self.width_after != later.width_before:
            raise SecateurError(
                f"the later plan starts from experts of {later.width_before} neurons, "
                f"but the earlier one leaves {self.width_after}"
            )
        width = self.width_before or later.width_before
        composed = LayerPlan(
            experts_before=self.experts_before,
            order=tuple(self.order[middle] for middle in later.order),
            sources={
                new: tuple(_combined(_inside(self, later.made_of(new), width)))
                for new, middle in enumerate(later.order)
                if new in later.sources or middle in self.sources
            },
            width_before=width,
        )
        return _without_copies(composed)

    def inverse(self) -> LayerPlan:
        """What undoes a re-ordering of experts, and of the neurons inside them.

        Raises:
            SecateurError: experts or neurons go, or experts are mixed.
        """
        if self.gone:
            raise SecateurError(
                f"the plan keeps {self.experts_after} of {self.experts_before} experts; "
                "only a permutation can be inverted"
            )
        if self.solved or any(len(entry) > 1 or entry[0].weight != 1 for entry in self.sources.values()):
            raise SecateurError("the plan mixes experts; only a permutation can be inverted")
        if self.width_after != self.width_before:
            raise SecateurError(
                f"the plan keeps {self.width_after} of {self.width_before} neurons; only a permutation can be inverted"
            )
        back = sorted(range(self.experts_before), key=self.order.__getitem__)
        moved = {
            self.order[new]: (Source(expert=new, neurons=source.neurons.inverse()),)
            for new, (source,) in self.sources.items()
            if source.neurons is not None
        }
        return replace(self, order=tuple(back), sources=dict(sorted(moved.items())))

    @property
    def _used(self) -> set[int]:
        return {source.expert for source in self._listed()}

    def _listed(self) -> Iterator[Source]:
        return itertools.chain.from_iterable(self.sources.values())


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
    return _without_copies(tidy)


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
            Source(expert=expert, weight=weight, neurons=_unless_all(source.neurons, width))
            for expert, weight, source in zip(experts, weights, entry, strict=True)
        ),
        key=_place,
    )
    for one, other in itertools.pairwise(tidy):
        if _place(one) == _place(other):
            raise SecateurError(f"{where}: expert {one.expert} is listed twice with the same neurons, expected once")
    return tuple(tidy)


def _convex(where: str, weights: list[float]) -> list[float]:
    """The weights, summing up to 1 to the last digits."""
    total = _total(weights)
    if min(weights) < 0 or abs(total - 1) > ROUNDING:
        raise SecateurError(
            f"{where}: weights {weights!r:.200} sum up to {total}, expected 1 and none below 0, or a plan that says "
            'weights="free"'
        )
    return weights if abs(total - 1) <= EXACT else [weight / total for weight in weights]


def _total(weights: Iterable[float]) -> float:
    """The sum, rounded once; infinite where it is too large for a number."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf


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


def _without_copies(plan: LayerPlan) -> LayerPlan:
    """The same plan, in which no entry that is a copy lists its source, and no width is said that nothing needs."""
    sources = {
        new: tuple(replace(source, neurons=_unless_all(source.neurons, plan.width_before)) for source in entry)
        for new, entry in plan.sources.items()
    }
    sources = {new: entry for new, entry in sources.items() if entry != (Source(expert=plan.order[new]),)}
    listed = any(source.neurons is not None for entry in sources.values() for source in entry)
    return replace(plan, sources=sources, width_before=plan.width_before if listed else None)


def _inside(earlier: LayerPlan, entry: Iterable[Source], width: int | None) -> Iterator[Source]:
    """The sources of the sources of an entry, of experts with `width` neurons."""
    for outer in entry:
        for inner in earlier.made_of(outer.expert):
            neurons = inner.neurons or outer.neurons
            if inner.neurons is not None and outer.neurons is not None:
                neurons = inner.neurons.then(outer.neurons)
            yield Source(expert=inner.expert, weight=inner.weight * outer.weight, neurons=_unless_all(neurons, width))


def _combined(entry: Iterable[Source]) -> Iterator[Source]:
    """Each (expert, neurons) once, with the sum of its weights."""
    for _, same in itertools.groupby(sorted(entry, key=_place), key=_place):
        first, *rest = same
        yield replace(first, weight=_total([first.weight, *(source.weight for source in rest)]))


def _place(source: Source) -> tuple[int, bytes]:
    return source.expert, b"" if source.neurons is None else source.neurons.array.tobytes()


def _unless_all(neurons: Neurons | None, width: int | None) -> Neurons | None:
    return None if neurons is not None and width is not None and neurons.is_identity(width) else neurons


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
