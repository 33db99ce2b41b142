"""A tensor in a safetensors file that is read only when it is asked for, and into memory of its own."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.model_folder.read.load import DTYPES
from secateur.model_folder.read.tensor_files import StoredTensor


class LazyTensor:
    """What transformers' loader takes in the place of a tensor: `[...]` reads it.

    The loader maps files into memory, where a tensor begins at any address; matrix products round by that. Here every
    tensor begins at a page, so that nothing depends on its place in a file.
    """

    def __init__(self, folder: Path, name: str, stored: StoredTensor) -> None:
        """
        Raises:
            SecateurError: a type that cannot be computed with as it is, such as one of a quantised model.
        """
        if stored.dtype not in DTYPES:
            raise SecateurError(f"{name} has type {stored.dtype}, expected one of {', '.join(DTYPES)}")
        self._path, self._stored = folder / stored.file, stored

    def __getitem__(self, index: EllipsisType) -> Tensor:
        stored = self._stored
        if not stored.length:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        # Memory of its own from the system, which gets it back with the tensor; of a heap, layers leave holes behind.
        memory = mmap.mmap(-1, stored.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view, done = memoryview(memory), 0
        with self._path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            while done < stored.length:  # the system reads at most 2 GB at once
                count = file.readinto(view[done:])
                if not count:
                    raise SecateurError(f"{self._path}: it has become shorter while it was read")
                done += count
        return torch.frombuffer(memory, dtype=DTYPES[stored.dtype]).reshape(stored.shape)
