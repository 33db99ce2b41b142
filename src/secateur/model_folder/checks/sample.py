"""What a pruned folder and its source are run on, and what each of them says."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.model_folder.checks.oracle import without_dropped
from secateur.model_folder.read.load import load
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.plans import Plan

NEW_TOKENS = 4  # that the pruned model generates
ROUNDING = 1e-4  # of the largest logit, where experts changed places and sums are taken in another order


def sample_for(folder: Path, source: ModelFolder, num_tokens: int, text: Path | None, seed: int) -> Tensor:
    """What the models are run on: (1, num_tokens) token ids, of a text through the folder's tokenizer or random ones.

    For a model of images, the random pixels of as many images as it takes to have `num_tokens` patches.
    """
    generator = torch.Generator().manual_seed(seed)
    config = source.config.text
    if source.config.model_class.main_input_name == "pixel_values":
        if text is not None:
            raise SecateurError(f"--text {text}: a {source.config.model_type!r} model reads images; leave it out")
        num_images = -(-num_tokens // (config.image_size // config.patch_size) ** 2)
        shape = (num_images, config.num_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=generator)
    if text is None:
        return torch.randint(1, int(config.vocab_size), (1, num_tokens), generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(_text_of(text), return_tensors="pt")["input_ids"][:, :num_tokens]
    if ids.shape[1] < 2:
        raise SecateurError(f"--text {text}: {ids.shape[1]} tokens, expected at least 2")
    return torch.as_tensor(ids)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(f"--text {path}: not UTF-8 ({error})") from error


def logits_without_dropped(folder: Path, source: ModelFolder, plan: Plan, sample: Tensor) -> Tensor:
    """Logits of the source without the experts that the plan drops, in its meaning of that; it lists every layer."""
    model, _ = load(folder, source)
    with without_dropped(model, source, plan):
        logits = logits_of(model, sample)
    del model
    gc.collect()
    return logits


def generated(model: PreTrainedModel, tokens: Tensor) -> list[int] | None:
    """What the model says after the tokens, greedily; None for a model that does not speak."""
    if not model.can_generate():
        return None
    with torch.no_grad():
        found: Any = model.generate(  # type: ignore[operator]
            tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
    return [int(token) for token in found[0, tokens.shape[1] :]]
