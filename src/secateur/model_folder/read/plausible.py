"""Is a config.json of the size that its files show? Asked before a model is built from it, of which nothing is trusted.

Names and shapes of the tensors are known from the headers. A number of the config that claims much more than they hold
would cost minutes and gigabytes before anything else refuses it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from secateur.errors import SecateurError
from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.modeling_secateur import COUNT_KEYS, TOP_K_KEYS

LAYER_KEYS = (
    "num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth", "encoder_layers", "decoder_layers",
    "num_nextn_predict_layers",
)  # fmt: skip
GROUP_KEYS = ("n_group", "num_expert_groups", "topk_group", "ensemble_size")
FEW_LAYERS = 256  # that may be built of what has no tensors here, such as a vision tower that was left out
MODULES, PER_TENSOR = 20_000, 4  # that a build may have: so many, and so many more for each tensor in the files


def check_plausible(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the counts of a config.json with the names and the shapes of the tensors beside it.

    Raises:
        SecateurError: more layers, experts, or experts a token than the tensors can be of; the message names the key.
    """
    layers = max((parts.layer + 1 for name in tensors if (parts := split(name)) is not None), default=0)
    sizes = [size for tensor in tensors.values() if math.prod(tensor.shape) for size in tensor.shape]
    most = max([len(tensors), *sizes])
    for path, part in _objects(config):
        experts = min(most, max((found for key in COUNT_KEYS if (found := _number(part, key))), default=most))
        for keys, limit, why in (
            (LAYER_KEYS, max(layers, FEW_LAYERS), f"the tensors are of {layers} layers"),
            (COUNT_KEYS, most, "no tensor has more entries along an axis"),
            ((*TOP_K_KEYS, *GROUP_KEYS), experts, "there are no more experts"),
        ):
            for key in keys:
                found = _number(part, key)
                if found is not None and found > limit:
                    raise SecateurError(
                        f"config.json: {path}{key} is {found!r:.40}, expected at most {limit}, as {why}"
                    )


@contextlib.contextmanager
def no_more_modules_than(tensors: Collection[str]) -> Iterator[None]:
    """While it lasts, no model is built that is much larger than these tensors, whatever number made it so.

    Raises:
        SecateurError: one is.
    """
    most, made = MODULES + PER_TENSOR * len(tensors), 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise SecateurError(
                f"it describes a model of more than {most} modules, but the files hold {len(tensors)} tensors"
            )

    handle = register_module_module_registration_hook(count)  # type: ignore[no-untyped-call]
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
