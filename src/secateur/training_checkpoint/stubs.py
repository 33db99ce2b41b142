"""Read the pickle of a torch.distributed.checkpoint `.metadata` file without running anything it names.

No class of torch is imported for it. Each name that such a file may hold becomes an empty class made for this one
reading, which keeps the arguments and the state that the pickle gives it; a name that is not listed is an error. So
the worst a hostile file can do is to describe tensors that are not there.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from secateur.errors import SecateurError

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED: dict[str, frozenset[str]] = {
    _METADATA: frozenset(
        {
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    # OLMo-core writes the same format with a class of its own
    "olmo_core.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset({"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}),
    "torch.serialization": frozenset({"_get_layout"}),
    # how Python 3.11.0 to 3.11.3 pickle a member of an enumeration; like all others it is not called
    "builtins": frozenset({"getattr"}),
    # the path of the folder when it was written, which nobody needs
    "pathlib": frozenset({"PosixPath", "WindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath"}),
}


class Stub:
    """Stands for one object of the pickle.

    kind: its class or function, "module.name". args: what it was made with. state: what it was filled with.
    """

    kind: str
    state: Any = None

    def __new__(cls, *args: Any) -> Stub:
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The reader in Python, not the one in C: that one makes room for whatever memo index a file names, gigabytes of it.
class _Reader(pickle._Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> type[Stub]:
        kind = f"{module}.{name}"
        if name not in ALLOWED.get(module, ()):
            raise SecateurError(f"its pickle names {kind!r}, which no checkpoint metadata needs; it was not loaded")
        return self._stubs.setdefault(kind, type(name, (Stub,), {"kind": kind}))


def read_stubs(data: bytes) -> Any:
    """What the pickle in `data` describes: plain values and `Stub`s.

    Raises:
        SecateurError: it names anything but the classes of such metadata, or is not a whole pickle.
    """
    try:
        return _Reader(data).load()
    except SecateurError:
        raise
    except Exception as error:  # whatever a broken pickle makes of the stack machine that reads it
        raise SecateurError(f"its pickle cannot be read ({type(error).__name__}: {error!s:.100})") from error
