"""How far is the mixture from each parent, before any training? Logits and perplexity on a text, in float32.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.tokenizer import check_ids, encode, load_tokenizer
from secateur.errors import SecateurError, foreign
from secateur.files.opened import opened
from secateur.files.progress import OnProgress
from secateur.model_folder.evaluation.perplexity import block_losses
from secateur.model_folder.read.load import CANNOT_RUN
from secateur.model_folder.read.tensor_files import TensorFiles, read_tensor_files
from secateur.upcycling.running import loaded

MOST_TOKENS = 512  # of the text, from its beginning


def text_tokens(text: Path, folder: Path, vocab_size: int) -> Tensor:
    """(1, T) the first tokens of a text.

    Raises:
        SecateurError: no UTF-8, fewer than 2 tokens, or ids that the model has no embedding for.
    """
    try:
        with opened(text, where=f"--text {text}", pipes=True) as file:
            content = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(f"--text {text}: not UTF-8 ({error})") from error
    ids = encode(load_tokenizer(folder), [content])[0][:MOST_TOKENS]
    if len(ids) < 2:
        raise SecateurError(f"--text {text}: {len(ids)} tokens, expected at least 2")
    check_ids(max(ids), vocab_size, folder)
    return torch.tensor([ids])


def compare(written: Path, parents: Sequence[TensorFiles], tokens: Tensor, on: OnProgress) -> dict[str, Any]:
    """The differences, as JSON. One model at a time is in memory, and the logits of two.

    Raises:
        SecateurError: a model does not fit in memory or cannot be run.
    """
    total = len(parents) + 1
    ours = _logits(read_tensor_files(written), tokens)
    on(1, total)
    result: dict[str, Any] = {"tokens": tokens.shape[1], "perplexity": _perplexity(ours, tokens), "parents": []}
    for number, files in enumerate(parents):
        theirs = _logits(files, tokens)
        gap = (ours - theirs).abs()
        result["parents"].append(
            {
                "parent": number,
                "perplexity": _perplexity(theirs, tokens),
                "max_logit_difference": float(gap.max()),
                "mean_logit_difference": float(gap.mean()),
            }
        )
        on(number + 2, total)
    return result


@torch.no_grad()
def _logits(files: TensorFiles, tokens: Tensor) -> Tensor:
    with loaded(files, torch.float32) as model, foreign(f"{files.path}: {CANNOT_RUN}"):
        found: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
        return found


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    return math.exp(min(block_losses(logits, tokens, None).mean, 700.0))
