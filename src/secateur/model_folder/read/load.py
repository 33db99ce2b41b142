"""Load the model of a folder into memory, or say why it cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.memory import free_memory
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.modeling_secateur import pruned_model_class


def why_not_loaded(folder: ModelFolder) -> str | None:
    """Why a model cannot be run here; None where it can."""
    if folder.files.is_quantised:
        return "it is quantised, and its experts are compared as bytes only"
    need, free = folder.files.num_bytes, free_memory()
    if need > free:
        return f"it needs {in_words(need)} of memory, {in_words(free)} are free"
    return None


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """While it lasts, transformers shows no bars beside our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load(
    folder: Path, source: ModelFolder, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """(model, what transformers reports of the load: missing, unexpected and mismatched tensors, errors).

    Nothing but transformers' own classes is loaded, whatever the folder's auto_map says.

    Args:
        dtype: of all tensors; "auto" is what config.json says, to which wider ones are rounded.
    """
    native = source.config.model_class
    loader: Any = pruned_model_class(native) if source.config.is_pruned else native
    with no_loading_bars():
        model, info = loader.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    with torch.no_grad():
        for tensor in model.parameters():  # they lie anywhere in a mapped file, and matrix products round by alignment
            tensor.data = tensor.data.clone()
    return model, {key: sorted(map(str, value)) for key, value in info.items() if value}


def load_whole(source: ModelFolder, dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """The model of a folder, see `load`, with nothing missing and nothing left over.

    Raises:
        SecateurError: tensors are missing, unexpected or of another shape.
    """
    path = source.files.path
    model, problems = load(path, source, dtype)
    if problems:
        raise SecateurError(f"{path}: transformers does not load it whole: {problems}"[:500])
    return model


def text_model(model: PreTrainedModel, folder: ModelFolder) -> PreTrainedModel:
    """The model that holds the decoder layers: `model` itself, or one inside it."""
    if not folder.config.is_nested:
        return model
    wanted = folder.config.text.model_type
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type == wanted:
            return module
    raise SecateurError(f"{type(model).__name__}: no {wanted} model inside it")
