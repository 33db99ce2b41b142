"""Is a config of a size that can be meant? Asked before a model is built, which would cost minutes and gigabytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook

from secateur.errors import SecateurError
from secateur.modeling_secateur import COUNT_KEYS, TOP_K_KEYS

LAYER_KEYS = (
    "num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_nextn_predict_layers",
)  # fmt: skip
GROUP_KEYS = ("n_group", "num_expert_groups", "topk_group", "ensemble_size")
SHARE = "dropout"  # keys that end with it are shares of numbers that are set to 0


def check_counts(config: Mapping[str, Any], *, layers: int, experts: int, why: str) -> None:
    """Compare the counts of a config, and of all configs inside it, with the largest that there can be.

    Args:
        layers, experts: the most of a model, and of a layer. why: it is so, for the message.

    Raises:
        SecateurError: more layers, more experts, or more experts a token than experts; the message names the key.
    """
    for path, part in _objects(config):
        mine = min(experts, max((found for key in COUNT_KEYS if (found := _number(part, key))), default=experts))
        for keys, most, reason in (
            (LAYER_KEYS, layers, why),
            (COUNT_KEYS, experts, why),
            ((*TOP_K_KEYS, *GROUP_KEYS), mine, f"as there are {mine} experts"),
        ):
            for key in keys:
                if (found := _number(part, key)) is not None and found > most:
                    raise SecateurError(f"{path}{key} is {found!r:.40}, expected at most {most}, {reason}")
        for key, value in part.items():
            if key.endswith(SHARE) and isinstance(value, int | float) and not 0 <= value <= 1:
                raise SecateurError(f"{path}{key} is {value!r:.40}, expected a number from 0 to 1")


@contextlib.contextmanager
def no_more_modules_than(most: int, why: str) -> Iterator[None]:
    """While it lasts, no model of more modules is built, whatever number of its config made it so.

    Raises:
        SecateurError: one is; `why` ends the message.
    """
    made = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise SecateurError(f"it describes a model of more than {most} modules, {why}")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def no_larger_buffers_than(most: int, why: str) -> Iterator[None]:
    """While it lasts, no model is built whose buffers, such as tables of positions, take more than `most` bytes.

    Raises:
        SecateurError: one is; `why` ends the message.
    """

    def look(module: nn.Module, name: str, buffer: Tensor | None) -> None:
        if buffer is not None and buffer.nbytes > most:
            raise SecateurError(f"it describes a model with {name} of {buffer.nbytes} bytes, {why}")

    handle = register_module_buffer_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _objects(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, value
    for key, part in value.items():
        if isinstance(part, dict):
            yield from _objects(part, f"{path}{key}.")


def _number(part: Mapping[str, Any], dotted: str) -> int | None:
    """The number at a key, the largest one of a list; None for what is none, which is refused elsewhere."""
    value: Any = part
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return max((one for one in (value if isinstance(value, list) else [value]) if type(one) is int), default=None)
