"""What the tests of streaming share: a model run as a whole, and the same data as batches and as calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.batch import Batch
from secateur.data.calibration import Calibration
from secateur.families import describe_moe
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.observation.activations import ActivationObserver
from secateur.stats import RouterStats
from support.tiny_models import random_tokens, tiny_model

LENGTHS = (12, 12, 12, 12, 12)  # of the sequences; batches of 2 leave a last one of 1
RAGGED = (12, 7, 9, 12, 5)


def found_in(folder: Path) -> ModelFolder:
    return read_model_folder(folder)


def vivid(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A tiny model of a row of FAMILIES, larger than at initialisation, and its folder."""
    model = tiny_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder, **{"max_shard_size": "60KB", **options})
    return model


def random_data(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> Calibration:
    """Packed where all lengths are one."""
    return Calibration(
        sequences=tuple(
            random_tokens(length, seed=seed + place).to(torch.int32) for place, length in enumerate(lengths)
        ),
        packed=len(set(lengths)) == 1,
        domains={"random": len(lengths)},
        about={"seed": seed},
    )


@torch.no_grad()
def whole_run(
    model: PreTrainedModel, batches: Sequence[Batch], text: PreTrainedModel | None = None, sums: Sequence[str] = ()
) -> tuple[RouterStats, list[Tensor]]:
    """(what ActivationObserver sees, the logits) of a loaded model; `text` is the one in it that holds the experts."""
    observer = ActivationObserver(describe_moe(text or model), sums=sums)
    try:
        logits = [
            model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False).logits for one in batches
        ]
        return observer.read(), logits
    finally:
        observer.detach()
