"""What do transformers' experts functions show of the inside of the experts, and in which order?

Legend: S token-slots, E experts, D model width, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secateur.families import MoEBlock
from secateur.stats import SUMS, recorded


def _sorted_by_expert(index: Tensor) -> Tensor:
    """The very sort of the grouped experts function, in which slots of one expert may come in any order."""
    return torch.sort(index.reshape(-1)).indices


def as_routed(index: Tensor) -> Tensor:
    return torch.arange(index.numel(), device=index.device)


# experts implementation of transformers -> the slot (token * K + k) of each row that `post_expert_norm` sees
ROWS: dict[str | None, Callable[[Tensor], Tensor]] = {"grouped_mm": _sorted_by_expert, "batched_mm": as_routed}


def implementation_of(experts: Any) -> str | None:
    """The experts function that transformers runs in place of the module's forward, None for a family without."""
    if not hasattr(experts, "has_post_expert_norm"):
        return None
    name: str | None = experts.config._experts_implementation
    return name


@contextmanager
def outputs_shown(experts: Any, shown: list[Tensor]) -> Iterator[None]:
    """While it lasts, the experts function of transformers appends its (S, D) outputs before the gates to `shown`."""
    had_norm = experts.has_post_expert_norm
    norm = experts.post_expert_norm if had_norm else None

    def show(outputs: Tensor) -> Tensor:
        outputs = outputs if norm is None else norm(outputs)
        shown.append(outputs)
        return outputs

    # The instance's own dictionary hides a submodule of that name without touching it.
    vars(experts).update(has_post_expert_norm=True, post_expert_norm=show)
    try:
        yield
    finally:
        del vars(experts)["post_expert_norm"]
        vars(experts)["has_post_expert_norm"] = had_norm


@contextmanager
def neurons_shown(experts: Any, shown: list[Tensor]) -> Iterator[None]:
    """While it lasts, the experts function appends the (S, F) input of its down projection to `shown`."""
    name = "_apply_gate" if experts.has_gate else "act_fn"
    original, own = getattr(experts, name), vars(experts).get(name)

    def show(inner: Tensor) -> Tensor:
        neurons: Tensor = original(inner)
        shown.append(neurons)
        return neurons

    vars(experts)[name] = show  # hides the method of the class, or the submodule
    try:
        yield
    finally:
        del vars(experts)[name]
        if own is not None:
            vars(experts)[name] = own


def needs_neurons(sums: Iterable[str]) -> bool:
    """Whether any of these sums looks inside the experts."""
    return any("F" in SUMS[name].axes for name in recorded(sums))


def axis_sizes(block: MoEBlock, width: int) -> dict[str, int]:
    """{axis of the sums: its size} of a layer whose router is given tokens of this width; F where it can be seen."""
    sizes = {"E": block.num_experts, "D": width}
    if implementation_of(block.experts) not in ROWS:
        return sizes
    experts: Any = block.experts
    _, *of_expert = experts.down_proj.shape
    inner, outer = of_expert if experts.is_transposed else reversed(of_expert)
    return sizes | {"D": outer, "F": inner}
