"""What must every tensor of a BAM be? Worked out whole from the parents.

Shapes: N parents, H heads of one, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from secateur.upcycling.bam import LASTS, Row, rows_of, stored
from secateur.upcycling.blocks import BLOCKS
from secateur.upcycling.compared import is_same
from secateur.upcycling.expected import Expected, Grown, mean_fault

DIFFERS = "differs from the parents' parts, one after another"


def expected_of_bam(grown: Grown) -> Iterator[Expected]:
    """All but the routers."""
    block, numbers = BLOCKS[grown.parents.model_type], range(len(grown.parents.each))
    for module, theirs in block.outside.items():
        for last in LASTS:
            source = f"{theirs}.{last}"
            if source in grown.parents.first.files.tensors:
                of = tuple(f"{number}:{source}" for number in numbers)
                name = f"{module}.{last}"
                yield Expected(name=name, made="averaged", of=of, fault=_outside(grown, name, source))
    for layer in range(grown.parents.layers):
        for row in rows_of(block):
            for last in LASTS:
                parts = [stored(grown.parents, 0, layer, role, last) for role in row.roles]
                if parts[0] is None:
                    continue
                name = f"model.layers.{layer}.{row.name if last == 'weight' else row.bias}"
                averaged = row.how == "mean" or (row.kv and grown.plan.shares_kv)
                of = tuple(f"{number}:{part.name}" for number in numbers for part in parts if part is not None)
                fault = _row(grown, name, row, layer, last, averaged=averaged)
                yield Expected(name=name, made="averaged" if averaged else "copied", of=of, fault=fault)


def _outside(grown: Grown, name: str, source: str) -> Callable[[], str]:
    return lambda: mean_fault(
        grown.ours(name), [grown.theirs(number, source) for number in range(len(grown.parents.each))]
    )


def _row(grown: Grown, name: str, row: Row, layer: int, last: str, *, averaged: bool) -> Callable[[], str]:
    def fault() -> str:
        ours = grown.ours(name)
        each = [
            torch.cat([_role(grown, number, layer, role, last) for role in row.roles])
            for number in range(len(grown.parents.each))
        ]
        stacked = row.how == "stack" or (row.how == "columns" and last == "bias")
        if averaged:
            return mean_fault(ours, [one[None] if stacked else one for one in each])
        wanted = torch.stack(each) if stacked else torch.cat(each, dim=1 if row.how == "columns" else 0)
        return "" if is_same(ours, wanted) else DIFFERS

    return fault


def _role(grown: Grown, number: int, layer: int, role: str, last: str) -> Tensor:
    """What a parent has of a role, by safetensors' own reader."""
    block = BLOCKS[grown.parents.model_type]
    if block.fused is None or role not in "qkv":
        return grown.theirs(number, f"{block.layers}.{layer}.{block.names[role]}.{last}")
    whole = grown.theirs(number, f"{block.layers}.{layer}.{block.fused}.{last}")
    by_head = whole.reshape(grown.parents["num_attention_heads"], 3, -1, *whole.shape[1:])
    return by_head[:, "qkv".index(role)].flatten(0, 1)
