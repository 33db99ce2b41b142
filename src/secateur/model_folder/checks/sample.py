"""What a pruned folder and its source are run on, and what a model says after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from secateur.data.tokenizer import check_ids, encode, load_tokenizer
from secateur.errors import SecateurError
from secateur.files.opened import opened
from secateur.model_folder.read.model_folder import ModelFolder

PROMPT, NEW_TOKENS = 4, 4  # at most so many of the sample are what the pruned model goes on from, by so many


def is_of_images(folder: ModelFolder) -> bool:
    """Whether the model reads images and no text."""
    return bool(folder.config.model_class.main_input_name == "pixel_values")


def sample_for(folder: Path, source: ModelFolder, num_tokens: int, text: Path | None, seed: int) -> Tensor:
    """What the models are run on: (1, num_tokens) token ids, of a text through the folder's tokenizer or random ones.

    For a model of images, the random pixels of as many images as it takes to have `num_tokens` patches.
    """
    generator = torch.Generator().manual_seed(seed)
    config = source.config.text
    if is_of_images(source):
        if text is not None:
            raise SecateurError(f"--text {text}: a {source.config.model_type!r} model reads images; leave it out")
        num_images = -(-num_tokens // (config.image_size // config.patch_size) ** 2)
        shape = (num_images, config.num_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=generator)
    if text is None:
        return torch.randint(1, int(config.vocab_size), (1, num_tokens), generator=generator)
    tokenizer = load_tokenizer(folder)
    ids = encode(tokenizer, [_text_of(text)], special=True)[0][:num_tokens]
    if len(ids) < 2:
        raise SecateurError(f"--text {text}: {len(ids)} tokens, expected at least 2")
    check_ids(max(ids), int(config.vocab_size), folder)
    return torch.tensor([ids])


def _text_of(path: Path) -> str:
    try:
        with opened(path, where=f"--text {path}", pipes=True) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(f"--text {path}: not UTF-8 ({error})") from error


def generated(model: PreTrainedModel, tokens: Tensor) -> list[int] | None:
    """What the model says after the first of the tokens, greedily; None for a model that does not speak.

    By settings of our own: those of a folder may ask for several sequences, for sampling, or for what needs more.
    """
    if not model.can_generate():
        return None
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    model.generation_config = settings  # from which generate() takes what the settings that it is given do not say
    prompt = tokens[:, :PROMPT]
    with torch.no_grad():
        found: Any = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
    return [int(token) for token in found[0, prompt.shape[1] :]]
