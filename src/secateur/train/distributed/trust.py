"""See that the optimizer's folder of a checkpoint is data: torch would run the code that its pickles name."""

from __future__ import annotations

import io
from pathlib import Path

from secateur.files.archive import load_plain
from secateur.training_checkpoint.metadata import read_dcp
from secateur.training_checkpoint.rows import read_bytes


def check_no_code(folder: Path) -> None:
    """Read every pickle of a torch.distributed.checkpoint folder without running what it names.

    (Tensors need no look: torch itself reads them with weights_only.)

    Raises:
        SecateurError: a pickle names more than such a folder needs, or the folder is not whole.
    """
    for name, place in read_dcp(folder).blobs.items():
        load_plain(io.BytesIO(read_bytes(place)), f"{folder}: {name} is not plain data and was not loaded")
