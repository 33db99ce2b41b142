"""What the models of a folder are run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from secateur.files.json import read_object
from secateur.model_folder.survey import Survey

Reads = Literal["text", "images"]
READS: dict[str, Reads] = {"vmoe": "images"}  # by model type, of pruned models too


def reads(found: Survey) -> Reads:
    return READS.get(found.model.model_type, "text")


def class_names(found: Survey) -> list[str]:
    """Of a classifier, in the order of its labels."""
    known: Any = found.model.config.id2label
    return [name for _, name in sorted(known.items())]


def declared(model: Path) -> Reads:
    """By the config.json alone, so of models without experts too; "text" where there is none."""
    file = model / "config.json"
    config = read_object(file) if file.is_file() else {}
    return READS.get(str(config.get("base_model_type", config.get("model_type"))), "text")
