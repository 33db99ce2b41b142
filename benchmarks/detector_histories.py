"""The recorded load histories, packed into one file of integers that tests and benchmarks read.

Legend: W windows, L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).parent / "results" / "detector_histories.npz"

# name -> type: loads (W, L, E), learning_rate (W,) after the window's last step, loss (W,), gradient (W, L, E) in
# 1/65535 of the layer's, margin (W, L)
ARRAYS: dict[str, Any] = {
    "loads": np.int32,
    "learning_rate": np.float32,
    "loss": np.float32,
    "gradient": np.uint16,
    "margin": np.float32,
}


def names_in(path: Path) -> set[str]:
    """The runs that a packed file has."""
    with np.load(path, allow_pickle=False) as file:
        return {key.rsplit("/", 1)[0] for key in file.files}
