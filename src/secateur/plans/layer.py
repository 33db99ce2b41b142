"""What each new expert of one layer is made of: old experts, weighted, with neurons taken or re-ordered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from secateur.errors import SecateurError
from secateur.plans.arrays import Matrix, Neurons


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
        return without_copies(composed)

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


def without_copies(plan: LayerPlan) -> LayerPlan:
    """The same plan, in which no entry that is a copy lists its source, and no width is said that nothing needs."""
    sources = {
        new: tuple(replace(source, neurons=unless_all(source.neurons, plan.width_before)) for source in entry)
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
            yield Source(expert=inner.expert, weight=inner.weight * outer.weight, neurons=unless_all(neurons, width))


def _combined(entry: Iterable[Source]) -> Iterator[Source]:
    """Each (expert, neurons) once, with the sum of its weights."""
    for _, same in itertools.groupby(sorted(entry, key=place_in_entry), key=place_in_entry):
        first, *rest = same
        yield replace(first, weight=total_of([first.weight, *(source.weight for source in rest)]))


def place_in_entry(source: Source) -> tuple[int, bytes]:
    return source.expert, b"" if source.neurons is None else source.neurons.array.tobytes()


def unless_all(neurons: Neurons | None, width: int | None) -> Neurons | None:
    return None if neurons is not None and width is not None and neurons.is_identity(width) else neurons


def total_of(weights: Iterable[float]) -> float:
    """The sum, rounded once; infinite where it is too large for a number."""
    try:
        return math.fsum(weights)
    except OverflowError:
        return math.inf
