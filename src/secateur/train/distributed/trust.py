"""See that the optimizer's folder of a checkpoint is data: torch would run the code that its pickles name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

from secateur.errors import SecateurError
from secateur.training_checkpoint.metadata import read_dcp
from secateur.training_checkpoint.rows import read_bytes


def check_no_code(folder: Path) -> None:
    """Read every pickle of a torch.distributed.checkpoint folder without running what it names.

    (Tensors need no look: torch itself reads them with weights_only.)

    Raises:
        SecateurError: a pickle names more than such a folder needs, or the folder is not whole.
    """
    for name, place in read_dcp(folder).blobs.items():
        try:
            torch.load(io.BytesIO(read_bytes(place)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise SecateurError(f"{folder}: {name} is not plain data and was not loaded: {error!s:.200}") from error
