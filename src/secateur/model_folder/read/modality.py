"""What the models of a folder are run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from secateur.files.json import read_object
from secateur.model_folder.read.model_folder import ModelFolder

Modality = Literal["text", "images"]
MODALITIES: dict[str, Modality] = {"vmoe": "images"}  # by model type, of pruned models too


def modality_of(folder: ModelFolder) -> Modality:
    return MODALITIES.get(folder.config.model_type, "text")


def class_names(folder: ModelFolder) -> list[str]:
    """Of a classifier, in the order of its labels."""
    known: Any = folder.config.config.id2label
    return [name for _, name in sorted(known.items())]


def modality_in_config(model: Path) -> Modality:
    """By the config.json alone, so of models without experts too; "text" where there is none."""
    file = model / "config.json"
    config = read_object(file) if file.is_file() else {}
    return MODALITIES.get(str(config.get("base_model_type", config.get("model_type"))), "text")
