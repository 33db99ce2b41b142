"""How much of a model to keep: a share, a number of experts a layer, a number of bytes, or a number for each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from secateur.decide.laep_rule import exact
from secateur.errors import SecateurError
from secateur.plans import JSON

UNITS = {"B": 1} | {
    f"{prefix}{kind}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for kind, base in (("", 1000), ("i", 1024))
}
KINDS = ("share", "count", "num_bytes", "layers")
EXPECTED = "a share such as 0.75, a number of experts such as 48, bytes such as 24GB, or layers such as 0:48,1:40"


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Exactly one of these.

    Args:
        share: of each layer's experts, above 0 and at most 1. A layer of E experts loses floor((1 - share) * E), and
            fewer where its router groups or devices ask for a rounder number; the share is taken as typed (0.71 of 100
            experts is 71). Where layers may differ, it is the share of the experts of all layers.
        count: experts of each layer; where layers may differ, on average.
        num_bytes: of the whole model afterwards, at most.
        layers: {layer: experts}, all layers.

    Raises:
        SecateurError: none or several of them, or a number out of range.
    """

    share: float | None = None
    count: int | None = None
    num_bytes: int | None = None
    layers: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SecateurError(f"keep: found {' with '.join(given) or 'nothing'}, expected exactly one of {KINDS}")
        if given == ["share"] and (
            isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1
        ):
            raise SecateurError(f"keep: the share is {self.share!r}, expected more than 0 and at most 1")
        numbers = {"count": self.count, "num_bytes": self.num_bytes}
        numbers |= {f"layer {layer!r}": count for layer, count in (self.layers or {}).items()}
        for name, number in numbers.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise SecateurError(f"keep: {name} is {number!r}, expected an integer of 1 or more")
        if self.layers is not None and (not self.layers or any(type(layer) is not int for layer in self.layers)):
            raise SecateurError(f"keep: layers are {list(self.layers)}, expected layer numbers, at least one")

    @classmethod
    def parse(cls, text: str) -> Keep:
        """What `--keep` says: "0.75", "48", "24GB" (or KB, MB, TB, and KiB ... TiB for powers of 1024), "0:48,1:40".

        A whole number is a count and a number with a point a share, so "1" keeps one expert and "1.0" all.

        Raises:
            SecateurError: something else, a layer listed twice, or a number out of range.
        """
        text = text.strip()
        if re.fullmatch(r"\d{1,15}", text):
            return cls(count=int(text))
        if re.fullmatch(r"\d*\.\d+|\d+\.", text):
            return cls(share=float(text))
        amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", text)
        if amount and amount[2] in UNITS:
            return cls(num_bytes=math.floor(Fraction(amount[1]) * UNITS[amount[2]]))
        if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
            pairs = [pair.split(":") for pair in text.split(",")]
            layers = {int(layer): int(count) for layer, count in pairs}
            if len(layers) < len(pairs):
                raise SecateurError(f"keep: {text!r} lists a layer twice")
            return cls(layers=layers)
        raise SecateurError(f"keep: found {text!r}, expected {EXPECTED}")

    def wanted(self, num_experts: Mapping[int, int]) -> dict[int, int]:
        """{layer: experts to keep} before any rounding, for all but `num_bytes`.

        Raises:
            SecateurError: `layers` is about other layers, or asks for more experts than there are.
        """
        if self.layers is not None and self.layers.keys() != num_experts.keys():
            raise SecateurError(f"keep: found layers {sorted(self.layers)}, expected {sorted(num_experts)}")
        if self.share is not None:
            share = exact(self.share)
            return {layer: experts - math.floor((1 - share) * experts) for layer, experts in num_experts.items()}
        wanted = dict(self.layers) if self.layers is not None else dict.fromkeys(num_experts, self.count or 0)
        for layer, count in wanted.items():
            if count > num_experts[layer]:
                raise SecateurError(f"keep: {count} experts in layer {layer}, which has only {num_experts[layer]}")
        return wanted

    def to_json(self) -> dict[str, JSON]:
        given = {name: getattr(self, name) for name in KINDS if getattr(self, name) is not None}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
