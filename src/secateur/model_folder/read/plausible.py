"""Is a config.json of the size that its files show? Nothing in it is trusted, and the headers are read before it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.model_folder.read.names import split
from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.surgery.plausible import check_counts, no_larger_buffers_than, no_more_modules_than

FEW_LAYERS = 256  # that may be built of what has no tensors here, such as a vision tower that was left out
MODULES, PER_TENSOR = 20_000, 4  # that a build may have: so many, and so many more for each tensor in the files
BUFFER = 2**28  # bytes that a buffer may have which no file holds, and as many more as the files have


def check_plausible(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the counts of a config.json with the names and the shapes of the tensors beside it.

    Raises:
        SecateurError: more layers, experts, or experts a token than the tensors can be of; the message names the key.
    """
    layers = max((parts.layer + 1 for name in tensors if (parts := split(name)) is not None), default=0)
    sizes = [size for tensor in tensors.values() if math.prod(tensor.shape) for size in tensor.shape]
    most = max([len(tensors), *sizes])
    try:
        check_counts(
            config,
            layers=max(layers, FEW_LAYERS),
            experts=most,
            why=f"as the tensors are of {layers} layers and none has more than {most} entries along an axis",
        )
    except SecateurError as error:
        raise SecateurError(f"config.json: {error}") from error


@contextlib.contextmanager
def no_more_than_files(tensors: Mapping[str, StoredTensor]) -> Iterator[None]:
    """While it lasts, no model is built that is much larger than these tensors; raises SecateurError where one is."""
    modules, held = MODULES + PER_TENSOR * len(tensors), sum(tensor.length for tensor in tensors.values())
    with (
        no_more_modules_than(modules, f"but the files hold {len(tensors)} tensors"),
        no_larger_buffers_than(BUFFER + held, f"but the files hold {held} bytes"),
    ):
        yield
