"""Perplexity of one or several model folders on the same blocks of tokens, loaded whole or layer by layer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.data.batch import Batch
from secateur.errors import SecateurError, foreign
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.evaluation.perplexity import BlockLosses, block_losses, difference, summary
from secateur.model_folder.read.load import CANNOT_RUN, load_whole, why_not_loaded
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import MemoryStates


def evaluate_text(
    models: Sequence[Path],
    batches: Sequence[Batch],
    domains: Sequence[str],
    *,
    stream: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_step: Callable[[Path], OnProgress] = lambda model: silent,
) -> list[dict[str, Any]]:
    """The results of every model, as JSON: those of `perplexity.summary`, and the "difference" from the first.

    Args:
        domains: of every block, in the order of the batches.
        stream: read the models layer by layer; left out: those that do not fit in memory.
        device: where models, or their layers, run. seed: of the bootstrap.
        on_step: gives for a model what is called with (steps done, steps in all).

    Raises:
        SecateurError: no such model, one that cannot be run here, or a loss that is no number.
    """
    surveys = {model: read_model_folder(model) for model in models}
    largest = max(int(batch.input_ids.max()) for batch in batches)
    for model, found in surveys.items():
        if largest >= int(found.config.text.vocab_size):
            raise SecateurError(
                f"{model}: a token of id {largest}, but its vocabulary is {found.config.text.vocab_size} by config.json"
            )
        if stream or why_not_loaded(found) is not None:
            StreamedModel(found, device=device)  # what cannot be run shows before another is measured
    short = [index for index, one in enumerate(domains) if _length(batches, index) < 2]
    if short:
        raise SecateurError(f"a sequence of {domains[short[0]]} has 1 token, expected 2 and more: one to predict")
    results: list[dict[str, Any]] = []
    first: BlockLosses | None = None
    for model, found in surveys.items():
        streamed = why_not_loaded(found) is not None if stream is None else stream
        lost = (streamed_losses if streamed else loaded_losses)(found, batches, device, on_step(model))
        found.files.check_unchanged(read=found.files.model_files)
        more = None if first is None else difference(lost, first, seed=seed)
        first = first or lost
        results.append({
            "path": str(model),
            "model_type": found.config.model_type,
            "experts": sum(found.counts.values()),
            "bytes": found.files.num_bytes,
            "streamed": streamed,
            **summary(lost, domains),
            "difference": more,
        })  # fmt: skip
    return results


def _length(batches: Sequence[Batch], index: int) -> int:
    """Tokens of a sequence, by its number over all batches."""
    for batch in batches:
        if index < len(batch.input_ids):
            mask = batch.attention_mask
            return batch.input_ids.shape[1] if mask is None else int(mask[index].sum())
        index -= len(batch.input_ids)
    raise SecateurError(f"{index} more domains than sequences")


def loaded_losses(folder: ModelFolder, batches: Sequence[Batch], device: str, on_step: OnProgress) -> BlockLosses:
    """Of the model in memory."""
    model = load_whole(folder)
    model.to(device).eval()  # type: ignore[arg-type]
    parts = []
    with torch.no_grad():
        for step, batch in enumerate(batches, start=1):
            moved = batch.to(device)
            with foreign(f"{folder.files.path} ({folder.config.model_type}): {CANNOT_RUN}"):
                output = model(input_ids=moved.input_ids, attention_mask=moved.attention_mask, use_cache=False)
            parts.append(block_losses(output.logits, batch.input_ids, batch.attention_mask))
            on_step(step, len(batches))
    del model, output
    gc.collect()
    return BlockLosses.joined(parts)


def streamed_losses(folder: ModelFolder, batches: Sequence[Batch], device: str, on_step: OnProgress) -> BlockLosses:
    """Of the model read layer by layer; the same numbers."""
    streamed = StreamedModel(folder, device=device)
    states = MemoryStates()
    parts: dict[int, BlockLosses] = {}

    def use(index: int, batch: Batch, logits: torch.Tensor) -> None:
        parts[index] = block_losses(logits, batch.input_ids, batch.attention_mask)

    streamed.run_layers(batches, states, on_step=on_step)
    streamed.run_head(batches, states, use=use)
    return BlockLosses.joined([parts[index] for index in range(len(batches))])
