"""Where the hidden states are while one layer takes the place of another: in memory, or in files that outlive a kill.

A stage is what one layer is given; stage L, after the last of L layers, is what that one returned.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import safetensors.torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.json import read_object
from secateur.files.opened import opened
from secateur.files.records import Count, Layer, Name, as_record
from secateur.files.safetensors_header import with_sorted_metadata
from secateur.model_folder.stream.shared import NOTHING, Shared

HIDDEN = "hidden"  # the tensor in a file of a batch that is not shared
FORM = r"^(tensor|tuple [1-9][0-9]{0,5})\Z"


class States(Protocol):
    """Hidden states of every batch.

    first: the stage that `get` can give from the start; 0, the first layer's, is never kept.
    form: how layers return hidden states, see `relay`; None while no layer has run.
    """

    first: int
    form: str | None

    def get(self, stage: int, index: int) -> tuple[Tensor, Shared]:
        """What batch `index` brings to the stage, on the host, and what layers before it left; see `stream.shared`."""

    def put(self, stage: int, index: int, hidden: Tensor, shared: Shared = NOTHING) -> None:
        """Keep both."""

    def finish(self, stage: int) -> None:
        """All batches have been put to the stage; the ones before it are not needed any more."""


class MemoryStates:
    """In the memory of this process."""

    def __init__(self) -> None:
        self.first = 0
        self.form: str | None = None
        self._hidden: dict[int, Tensor] = {}  # a batch's next state takes the place of the last
        self._shared: dict[int, Shared] = {}

    def get(self, stage: int, index: int) -> tuple[Tensor, Shared]:
        return self._hidden[index], self._shared[index]

    def put(self, stage: int, index: int, hidden: Tensor, shared: Shared = NOTHING) -> None:
        self._hidden[index] = _plain(hidden)
        self._shared[index] = {name: _plain(tensor) for name, tensor in shared.items()}

    def finish(self, stage: int) -> None:
        pass


class KeptStates(MemoryStates):
    """In memory, of one batch, and kept: handed_on has what each layer gave to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.handed_on: list[Tensor] = []

    def put(self, stage: int, index: int, hidden: Tensor, shared: Shared = NOTHING) -> None:
        super().put(stage, index, hidden, shared)
        self.handed_on.append(self._hidden[index])


class StageFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """stage.json: the last stage that is finished, the form of what its layers return, SHA-256 of each batch's file."""

    stage: Layer
    form: Annotated[str, msgspec.Meta(pattern=FORM, description="'tensor' or 'tuple N'")]
    sha256: dict[Count, Name] = {}


class DiskStates:
    """In a folder, one file a batch; a stage counts once it is finished, and the last finished one is kept.

    While a layer runs, two stages are on the disk.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            SecateurError: something else is in the folder.
            OSError: it cannot be made or read.
        """
        self._folder, self._record = folder, folder / "stage.json"
        self.first, self.form = 0, None
        self._digests: dict[int, dict[int, str]] = {}  # by stage and batch
        folder.mkdir(parents=True, exist_ok=True)
        if self._record.exists():
            try:
                found = as_record(read_object(self._record), StageFile, str(self._record))
            except SecateurError as error:
                raise SecateurError(f"{error}; not what an unfinished run writes, use --restart") from error
            self.first, self.form = found.stage, found.form
            self._digests[found.stage] = found.sha256
        self._keep_only(self.first)

    def get(self, stage: int, index: int) -> tuple[Tensor, Shared]:
        """
        Raises:
            SecateurError: the file is not the one that was written.
        """
        path = self._path(stage, index)
        with opened(path) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != self._digests[stage].get(index):
            raise SecateurError(f"{path}: not what an unfinished run writes, use --restart")
        found = {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}
        return found.pop(HIDDEN), found  # clones: else they begin at any address, by which products round

    def put(self, stage: int, index: int, hidden: Tensor, shared: Shared = NOTHING) -> None:
        path = self._path(stage, index)
        path.parent.mkdir(exist_ok=True)
        kept = {name: _plain(tensor) for name, tensor in {HIDDEN: hidden, **shared}.items()}
        content = with_sorted_metadata(safetensors.torch.save(kept))
        self._digests.setdefault(stage, {})[index] = hashlib.sha256(content).hexdigest()
        atomic_write(path, content, in_work_folder=True)

    def finish(self, stage: int) -> None:
        digests = self._digests[stage]
        atomic_write(self._record, json.dumps({"stage": stage, "form": self.form, "sha256": digests}))
        self._digests = {stage: digests}
        self._keep_only(stage)

    def _path(self, stage: int, index: int) -> Path:
        return self._folder / f"{stage:05}" / f"{index:06}.safetensors"

    def _keep_only(self, stage: int) -> None:
        for path in self._folder.iterdir():
            if path.is_dir() and path.name != f"{stage:05}":
                shutil.rmtree(path)


def _plain(hidden: Tensor) -> Tensor:
    return hidden.detach().cpu().contiguous()
