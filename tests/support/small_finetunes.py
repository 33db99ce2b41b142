"""Fine-tunings of a few tenths of a second: tiny models, the data they learn, and the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.run import run_finetuning
from secateur.models.vmoe.pixels import FILE, default_pixels
from support.models_with_text import model_with_text
from support.tiny_vision import tiny_vmoe

CLASSES = 5
QUICK: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "warmup": 0, "log_steps": 1, "save_steps": 0}


def text_folder(root: Path) -> Path:
    """`source`, a language model with its tokenizer, with code.jsonl and prose.jsonl beside it."""
    model_with_text(root)
    (root / "source" / "plan.json").write_text("{}\n")
    (root / "source" / "report.json").write_text("{}\n")
    (root / "source" / "more").mkdir()
    (root / "source" / "more" / "notes.txt").write_text("kept\n")
    return root


def text_options(root: Path, **changes: Any) -> FinetuneOptions:
    data = tuple(f"{name}={root / name}.jsonl" for name in ("code", "prose"))
    return FinetuneOptions(**{"data": data, "sequence_length": 16, **QUICK, **changes})


def image_folder(root: Path, **changes: Any) -> Path:
    """`source`, an image classifier, with train.npz beside it: class c has its bright square at place c."""
    model = tiny_vmoe("token choice", num_labels=CLASSES, **changes)
    model.save_pretrained(root / "source")
    (root / "source" / FILE).write_text(json.dumps(default_pixels(model.config)))
    write_images(root / "train.npz", CLASSES)
    return root


def write_images(path: Path, classes: int, *, each: int = 8) -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    images = draw.integers(0, 60, (len(labels), 8, 8, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[4 * row : 4 * row + 4, 2 * column : 2 * column + 2] += 180
    np.savez(path, images=images, labels=labels)


def image_options(root: Path, **changes: Any) -> FinetuneOptions:
    return FinetuneOptions(**{"data": (str(root / "train.npz"),), **QUICK, **changes})


def run(root: Path, out: Path, options: FinetuneOptions, **more: Any) -> dict[str, Any]:
    return run_finetuning(root / "source", out, options, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    """Content by name, without what a clock decides."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "finetune.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
