"""A tensor's name in parts: where its layer stands, and what follows."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """`model.layers.3.mlp.gate.weight` is prefix `model`, container `layers`, layer 3, rest `mlp.gate.weight`."""

    prefix: str
    container: str
    layer: int
    rest: str

    @property
    def path(self) -> str:
        """Of the list of layers."""
        return f"{self.prefix}.{self.container}"


def split(name: str) -> Name | None:
    """The parts of a name, by its first number; None for a tensor of no layer."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part[:1].isdecimal() and NUMBER.fullmatch(part)), 0)
    if at == 0 or at == len(parts) - 1:
        return None
    return Name(
        prefix=".".join(parts[: at - 1]),
        container=parts[at - 1],
        layer=int(parts[at]),
        rest=".".join(parts[at + 1 :]),
    )


def numbered(rest: str, before: str) -> tuple[int, str] | None:
    """`experts.7.up_proj.weight` after `experts` is (7, `up_proj.weight`); None where no number follows."""
    head, dot, tail = rest.removeprefix(f"{before}.").partition(".")
    if not rest.startswith(f"{before}.") or not dot or not NUMBER.fullmatch(head):
        return None
    return int(head), tail


def is_mtp(path: str) -> bool:
    """Whether a path is one of multi-token-prediction layers, which stand beside the model's own."""
    lower = path.lower()
    return "mtp" in lower and any(part.startswith("mtp") for part in lower.split("."))
