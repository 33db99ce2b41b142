"""What must every tensor of a grown model be? Worked out whole from the parents, another way than it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import TensorFiles
from secateur.upcycling.compared import is_same, read_tensor, ulp, unlike
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.recipe import SHARED_FACTOR, Division, expert_name, neurons_of, shared_name
from secateur.upcycling.targets import BAM, FFN

SIGMAS = 8.0  # of noise, that no entry exceeds


@dataclass(frozen=True, kw_only=True)
class Grown:
    """What a folder was made of, and what is in it."""

    parents: Parents
    plan: Blueprint
    asked: Asked
    division: Division
    written: TensorFiles

    def ours(self, name: str) -> Tensor:
        return read_tensor(self.written, name)

    def theirs(self, number: int, name: str) -> Tensor:
        return read_tensor(self.parents.each[number].files, name)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A tensor. of, times: what it is made of, `number of the parent:name`. fault: why it is not; "" where it is."""

    name: str
    made: Literal["copied", "averaged", "router"]
    of: tuple[str, ...] = ()
    times: float = 1.0
    fault: Callable[[], str]


def expected_tensors(grown: Grown) -> Iterator[Expected]:
    """Of all tensors; where a router begins is another question."""
    from secateur.upcycling.expected_bam import expected_of_bam

    yield from expected_of_bam(grown) if grown.plan.target is BAM else _of_stock(grown)
    for layer in range(grown.parents.layers):
        for name in layout_of(grown.plan).routers(grown.plan, layer):
            yield Expected(name=name, made="router", fault=_units(grown, name))


def mean_fault(ours: Tensor, each: Sequence[Tensor]) -> str:
    """Why a tensor is not the mean of others, rounded once."""
    return unlike(ours, torch.stack([one.double() for one in each]).mean(0))


def _of_stock(grown: Grown) -> Iterator[Expected]:
    plan, only = grown.plan, grown.asked.attention_from
    numbers = range(len(grown.parents.each)) if only is None else [only]
    for name in grown.parents.first.files.tensors:
        parts = split(name)
        if parts is None or parts.rest not in FFN.values():
            made: Literal["copied", "averaged"] = "copied" if len(numbers) == 1 else "averaged"
            of = tuple(f"{number}:{name}" for number in numbers)
            yield Expected(name=name, made=made, of=of, fault=_rest(grown, name, numbers))
    for layer in range(grown.parents.layers):
        listed = grown.division.get(layer)
        busy: Sequence[int] = range(plan.shared) if listed is None else listed[: plan.shared]
        for role, theirs in FFN.items():
            source = f"model.layers.{layer}.{theirs}"
            for number, expert in enumerate(plan.experts):
                yield _part(
                    grown, expert_name(plan, layer, number, role), expert.parent, source,
                    neurons_of(plan, expert, listed), plan.factor if role == "down" else 1.0, grown.asked.noise,
                )  # fmt: skip
            if plan.target.shared:
                factor = SHARED_FACTOR if role == "down" else 1.0
                yield _part(grown, shared_name(layer, role), 0, source, busy, factor, 0.0)


def _rest(grown: Grown, name: str, numbers: Sequence[int]) -> Callable[[], str]:
    def fault() -> str:
        ours, theirs = grown.ours(name), [grown.theirs(number, name) for number in numbers]
        if len(theirs) > 1:
            return mean_fault(ours, theirs)
        return "" if is_same(ours, theirs[0]) else "differs from its parent"

    return fault


def _part(
    grown: Grown, name: str, number: int, source: str, neurons: Sequence[int], factor: float, noise: float
) -> Expected:
    def fault() -> str:
        ours, whole = grown.ours(name), grown.theirs(number, source)
        axis = 1 if source.endswith(FFN["down"]) else 0
        part = whole.index_select(axis, torch.tensor(list(neurons), dtype=torch.long))
        if noise:
            wanted = part.double() * factor
            bound = SIGMAS * noise * float(wanted.square().mean().sqrt()) + float(ulp(ours).max())
            far = float((ours.double() - wanted).abs().max()) if ours.shape == wanted.shape else float("inf")
            return "" if far <= bound else f"is {far:.3g} from its parent, more than its noise"
        if factor == 1:
            return "" if is_same(ours, part) else "differs from its part of the parent"
        return unlike(ours, part.double() * factor)

    of = (f"{number}:{source}",) if neurons else ()
    return Expected(name=name, made="copied", of=of, times=factor if neurons else 1.0, fault=fault)


def _units(grown: Grown, name: str) -> Callable[[], str]:
    """Experts of one unit have equal rows."""

    def fault() -> str:
        ours, experts = grown.ours(name), grown.plan.experts
        if ours.shape[0] != len(experts):
            return ""
        first: dict[int, int] = {}
        for row, source in enumerate(experts):
            if not torch.equal(ours[row], ours[first.setdefault(source.unit, row)]):
                return f"has another row for expert {row} than for others of its unit"
        return ""

    return fault
