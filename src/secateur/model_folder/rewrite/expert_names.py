"""Names of single experts in what says how a model is quantised, and what they are after a pruning.

A name that has an expert's number gets its new one, or goes with the expert. A pattern that matches some experts of a
layer and not others becomes the names of what it matched; one that matches all of them or none stays as it is.
"""

from __future__ import annotations

import bisect
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from secateur.errors import SecateurError
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.names import is_mtp, numbered, split
from secateur.model_folder.rewrite.patterns import is_pattern, matcher, split_prefix, start_of
from secateur.plans import Plan

# Sounds like the number of an expert, also in a pattern: experts.3, experts\.(3|5), experts\.[35]; not experts\.[0-9]
NUMBERED = re.compile(r"experts(?:\\*\.|\[)(?:[(?:]*[0-9]|\[(?!\^?0-9\])[0-9])")
SECONDS = 5  # of a processor, for all patterns of a file
BY_REGEX = ("-:", "+:")  # in the place of which a regular expression must stand, and no plain name


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A module of one expert: `model.layers.1.mlp.experts.3.gate_proj` has the tail `gate_proj`."""

    layer: int
    expert: int
    tail: str


class ExpertNames:
    """The names of the modules of a folder, and what a plan, which lists every layer, makes of them."""

    def __init__(self, folder: ModelFolder, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._modules: dict[str, Module] = {}
        self._others: set[str] = set()
        for name in folder.files.tensors:
            place = folder.located.get(name)
            module = name.rpartition(".")[0] or name
            if place is None or place.spec is not None:
                self._others.add(module)
                continue
            tail = place.after.rpartition(".")[0]
            expert = name.removesuffix(f".{place.after}")
            self._modules[module] = Module(layer=place.layer, expert=place.expert, tail=tail)
            self._modules.setdefault(expert, Module(layer=place.layer, expert=place.expert, tail=""))
        self._sorted = sorted({*self._modules, *self._others})
        self._longest = max(map(len, self._sorted), default=0)
        self._until = time.process_time() + SECONDS

    def now(self, text: str) -> list[str]:
        """What stands for an entry after the pruning: itself, other names, or none.

        Raises:
            SecateurError: it has numbers of experts, and no rule can say the same of the kept ones.
        """
        if is_pattern(text):
            return self._pattern(text)
        if (known := self._plain(text)) is not None:
            return known
        if NUMBERED.search(text):
            raise SecateurError(f"{text!r:.120} names single experts, whose numbers change, and no rule for it exists")
        return [text]

    def relative(self, text: str) -> tuple[str, int, str] | None:
        """(before, number, tail) of a name within any layer, such as `mlp.experts.3.gate_proj`; None for another."""
        for before in self._folder.layout.own:
            if own := numbered(f"{text}.", before):
                return before, own[0], own[1].removesuffix(".")
        return None

    def kept_of_all(self, numbers: Iterable[int]) -> int | None:
        """How many numbers stay where a list names all experts of a layer for every layer; None where it does not."""
        after = {one.experts_after for one in self._plan.layers.values()}
        before = {one.experts_before for one in self._plan.layers.values()}
        return max(after) if before == {len(set(numbers))} == {max(numbers, default=-1) + 1} else None

    def _plain(self, text: str) -> list[str] | None:
        parts = split(f"{text}.")  # the number may be the last part
        if parts is None or parts.container not in self._folder.layout.containers:
            return None
        found = self.relative(parts.rest.removesuffix("."))
        layer = parts.layer + self._folder.config.num_layers * is_mtp(parts.path)
        if found is None:
            return None
        if layer not in self._plan.layers:  # none of this model
            return [text]
        before, number, tail = found
        order = self._plan.layers[layer].order
        stem = f"{parts.path}.{parts.layer}.{before}"
        return [".".join(filter(None, (stem, str(order.index(number)), tail)))] if number in order else []

    def _pattern(self, text: str) -> list[str]:
        try:
            matched = self._matched(text)
        except SecateurError as error:
            if NUMBERED.search(text):
                raise SecateurError(f"{text!r:.120}: {error}; it names single experts, whose numbers change") from error
            return [text]
        found = [name for name in matched if name in self._modules]
        if not found and NUMBERED.search(text):
            raise SecateurError(f"{text!r:.120} sounds like single experts, but matches none of this model")
        if self._is_about_all(found):
            return [text]
        leaves = [name for name in found if self._modules[name].tail] or found
        leaves.sort(key=lambda name: (self._modules[name].layer, self._modules[name].expert, self._modules[name].tail))
        names = [new for name in leaves for new in self._plain(name) or ()]
        names += [name for name in matched if name in self._others]
        prefix, _ = split_prefix(text)
        return [f"{prefix}{re.escape(name)}$" for name in names] if prefix in BY_REGEX else names

    def _matched(self, text: str) -> list[str]:
        matches, start = matcher(text, self._longest), start_of(text)
        found = []
        for name in itertools.takewhile(lambda one: one.startswith(start), self._from(start)):
            if matches(name):
                found.append(name)
            if time.process_time() > self._until:
                raise SecateurError(f"a pattern whose search takes more than {SECONDS} s")
        return found

    def _from(self, start: str) -> Iterator[str]:
        """The names in their order, from the first one that may begin like this."""
        return itertools.islice(self._sorted, bisect.bisect_left(self._sorted, start), None)

    def _is_about_all(self, found: Iterable[str]) -> bool:
        """Whether of every layer all experts are among the names, or none, by what follows the number."""
        experts: dict[tuple[int, str], set[int]] = {}
        for name in found:
            module = self._modules[name]
            experts.setdefault((module.layer, module.tail), set()).add(module.expert)
        counts = self._folder.all_counts
        return all(len(numbers) == counts[layer] for (layer, _), numbers in experts.items())


def renamed(value: object, names: ExpertNames, where: str, *, key: str = "") -> object:
    """A JSON value with the names of experts in it as they are after a pruning: keys of objects, entries of lists.

    Args:
        where: of the value, for messages. key: under which it stands.

    Raises:
        SecateurError: a name or pattern that cannot be said of the kept experts.
    """
    try:
        if isinstance(value, Mapping):
            return _renamed_keys(value, names, where)
        if isinstance(value, list):
            return _renamed_entries(value, names, where, key)
        if isinstance(value, str) and names.now(value) != [value]:
            raise SecateurError(f"{value!r:.120} names single experts, and {key} takes one name")
    except SecateurError as error:
        raise error if str(error).startswith(where) else SecateurError(f"{where}: {error}") from error
    return value


def _renamed_keys(value: Mapping[str, object], names: ExpertNames, where: str) -> dict[str, object]:
    made: dict[str, object] = {}
    for name, inner in value.items():
        changed = renamed(inner, names, where, key=name)
        for new in names.now(name):
            if new in made and made[new] != changed:
                raise SecateurError(f"{name!r:.120} and another entry both speak of {new!r:.120}")
            made[new] = changed
    return made


def _renamed_entries(value: list[object], names: ExpertNames, where: str, key: str) -> list[object]:
    within = {text: found for text in value if isinstance(text, str) and (found := names.relative(text))}
    numbers: dict[tuple[str, str], set[int]] = {}
    for before, number, tail in within.values():
        numbers.setdefault((before, tail), set()).add(number)
    kept = {ending: names.kept_of_all(listed) for ending, listed in numbers.items()}
    made: list[object] = []
    for entry in value:
        if isinstance(entry, str) and entry in within:
            before, number, tail = within[entry]
            if (count := kept[before, tail]) is None:
                raise SecateurError(f"{entry!r:.120} names one expert in every layer, and its number differs by layer")
            made += [entry] if number < count else []
        elif isinstance(entry, str):
            made += names.now(entry)
        else:
            made.append(renamed(entry, names, where, key=key))
    return made
