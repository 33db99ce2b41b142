"""Experts with a tensor each are stacked by reading every one to its place; transformers would copy them twice.

Stacked (E tensors (n, ...) -> (E, n, ...)), and their projections joined then along axis 1, their bytes lie one after
another: of the first expert the first projection, the second, then of the next expert.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from secateur.errors import SecateurError
from secateur.model_folder.stream.lazy_tensor import UnreadTensor, new_tensor

CHAINS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])  # of (operation, axis), that are replaced


class PlacingConverter(WeightConverter):
    """Takes the place of a converter whose operations are one of CHAINS; the loader gives it an UnreadTensor each."""

    __slots__ = ()

    @classmethod
    def of(cls, other: WeightConverter) -> PlacingConverter:
        made = cls([*other.source_patterns], [*other.target_patterns], other.operations, other.force_cpu)
        made.scope_prefix, made.base_model_prefix = other.scope_prefix, other.base_model_prefix
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> PlacingConverter:
        """For every tensor the loader wants one that collects tensors of its own; the rest of it does not change."""
        twin = copy.copy(self)
        twin.collected_tensors, twin.layer_targets = defaultdict(list), defaultdict(set)
        return twin

    def convert(self, layer_name: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        """{name in the model: (E, ...)}.

        Raises:
            SecateurError: the tensors are not alike. OSError: one cannot be read.
        """
        tensors: dict[str, list[Any]] = self.materialize_tensors()
        return {layer_name: _placed(layer_name, [tensors[one] for one in self.source_patterns if one in tensors])}


def with_placing(transforms: Iterable[Any]) -> list[Any]:
    """The same transforms, but a PlacingConverter for every one that it can stand for."""
    return [PlacingConverter.of(one) if _is_chain(one) else one for one in transforms]


def _is_chain(transform: Any) -> bool:
    if type(transform) is not WeightConverter or len(transform.target_patterns) != 1:
        return False
    found = [(type(operation), getattr(operation, "dim", None)) for operation in transform.operations]
    return found in CHAINS and (len(found) == 2 or len(transform.source_patterns) == 1)


def _placed(name: str, projections: list[list[UnreadTensor]]) -> Tensor:
    """The tensors of each projection, by expert, as one."""
    kinds = [[one.shape for one in of_experts] for of_experts in projections]
    if any(len(kind) != len(kinds[0]) or len(set(kind)) > 1 or kind[0][1:] != kinds[0][0][1:] for kind in kinds):
        found = "; ".join(f"{len(kind)} of {sorted(set(kind))}" for kind in kinds)
        raise SecateurError(f"{name}: it is made of tensors of shapes {found:.200}, expected as many alike of each")
    first = projections[0][0]
    joined = (sum(kind[0][0] for kind in kinds), *first.shape[1:]) if len(kinds) > 1 else first.shape
    whole, memory = new_tensor((len(kinds[0]), *joined), first.dtype)
    flat, at, size = whole.view(-1), 0, whole.element_size()
    for of_expert in zip(*projections, strict=True):
        for one in of_expert:
            end = at + math.prod(one.shape)
            if one.stored_dtype == one.dtype:
                one.read_into(memory[at * size : end * size])
            else:
                flat[at:end] = one.read().view(-1)
            at = end
    return whole.to(first.device)
