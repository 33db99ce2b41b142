"""A tensor in a safetensors file that is read only when it is asked for, and into memory of its own."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from types import EllipsisType
from typing import Self

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.refused import naming
from secateur.model_folder.read.load import DTYPES
from secateur.model_folder.read.tensor_files import StoredTensor

Span = tuple[int, int]  # first byte and number of bytes, in a tensor


class LazyTensor:
    """What transformers' loader takes in the place of a tensor: `[...]` reads it.

    The loader maps files into memory, where a tensor begins at any address; matrix products round by that. Here every
    tensor begins at a page, so that nothing depends on its place in a file.
    """

    def __init__(self, folder: Path, name: str, stored: StoredTensor, spans: Sequence[Span] | None = None) -> None:
        """
        Args:
            spans: what is read; all without it. The rest is 0, and takes no memory.

        Raises:
            SecateurError: a type that cannot be computed with as it is, such as one of a quantised model.
        """
        if stored.dtype not in DTYPES:
            raise SecateurError(f"{name} has type {stored.dtype}, expected one of {', '.join(DTYPES)}")
        self._path, self._stored = folder / stored.file, stored
        self._spans = ((0, stored.length),) if spans is None else spans
        self.shape, self.stored_dtype = stored.shape, DTYPES[stored.dtype]

    def __getitem__(self, index: EllipsisType) -> Tensor | Self:
        return self.read()

    def read(self) -> Tensor:
        """
        Raises:
            SecateurError: the file has become shorter.
        """
        tensor, memory = new_tensor(self.shape, self.stored_dtype)
        self.read_into(memory)
        return tensor

    def read_into(self, memory: memoryview) -> None:
        """Read the bytes into memory of as many, which is 0.

        Raises:
            SecateurError: the file has become shorter.
        """
        if not self._spans:
            return
        with self._path.open("rb", buffering=0) as file, naming(self._path):
            for first, length in self._spans:
                file.seek(self._stored.start + first)
                done = 0
                while done < length:  # the system reads at most 2 GB at once
                    count = file.readinto(memory[first + done : first + length])
                    if not count:
                        raise SecateurError(f"{self._path}: it has become shorter while it was read")
                    done += count


class UnreadTensor(LazyTensor):
    """One that stays unread while the loader believes that it reads and converts it; `placed` reads it to its place.

    dtype, device: what the loader asks for.
    """

    dtype: torch.dtype
    device: torch.device | str

    def __getitem__(self, index: EllipsisType) -> Tensor | Self:
        return self

    def to(self, *, device: torch.device | str, dtype: torch.dtype) -> Self:
        self.device, self.dtype = device, dtype
        return self


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    """A tensor of zeros, and the same memory as bytes.

    Memory of its own from the system, which gets it back with the tensor; of a heap, layers leave holes behind.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if not tensor.nbytes:
        return torch.empty(tuple(shape), dtype=dtype), memoryview(b"")
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # else a read takes longer to find pages than to fill them
    return torch.frombuffer(memory, dtype=dtype).reshape(tuple(shape)), memoryview(memory)
