"""Which software computed a result."""

from __future__ import annotations

import torch
import transformers

from secateur import __version__


def versions() -> dict[str, str]:
    return {"secateur": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
