"""What the models of a folder are run on."""

from __future__ import annotations

from typing import Literal

from secateur.checkpoint.survey import Survey

Reads = Literal["text", "images"]
READS: dict[str, Reads] = {"vmoe": "images"}  # by model type, of pruned models too


def reads(found: Survey) -> Reads:
    return READS.get(found.model.model_type, "text")
