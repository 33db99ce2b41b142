"""Load the model of a folder into memory, or say why it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words
from secateur.files.dtypes import torch_dtypes
from secateur.files.memory import free_memory
from secateur.files.progress import no_loading_bars
from secateur.model_folder.read.config import floats
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.names import split
from secateur.modeling_secateur import pruned_model_class, read_pruned_config
from secateur.surgery.load_faults import MISFIT, faults_named

DTYPES = torch_dtypes("BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64")  # that can be computed with as they are
# around a forward: it says nothing of whose fault that is
CANNOT_RUN = "the model, as its config.json and weights are, cannot be run on this"
UNSOUND = "either its weights are not finite, or a number in its config.json is wrong"
UNEXPECTED = "unexpected_keys"  # of what transformers reports of a load
ALIGNED = 64  # bytes that torch gives every tensor of its own a multiple of
WHILE_LOADING = 1.5  # times the bytes of a model: while experts are stacked, some of them are there twice


def why_not_loaded(folder: ModelFolder, times: float = 1.0) -> str | None:
    """Why a model cannot be loaded as a whole here; None where it can.

    Args:
        times: the bytes of its tensors that are needed.
    """
    if folder.files.is_quantised:
        return "it is quantised, and its experts are compared as bytes only"
    need, free = int(folder.files.num_bytes * times), free_memory()
    if need > free:
        return f"it needs {in_words(need)} of memory, {in_words(free)} are free"
    return None


def problems_by_names(folder: ModelFolder) -> dict[str, list[str]]:
    """What transformers reports of loading the folder's tensors, by their names, types and shapes; none is read."""
    return _problems(_reported(folder), folder)


def _reported(folder: ModelFolder) -> Mapping[str, Iterable[Any]]:
    tensors = {
        name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for name, tensor in folder.files.tensors.items()
    }
    with no_loading_bars():
        info: Mapping[str, Iterable[Any]]
        _, info = _loader(folder).from_pretrained(
            None,
            config=_config(folder),
            state_dict=tensors,
            device_map={"": "meta"},
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return info


def _problems(info: Mapping[str, Iterable[Any]], folder: ModelFolder) -> dict[str, list[str]]:
    """What transformers reports, without layers that predict further tokens: its classes have no place for them."""
    found = {key: sorted(map(str, value)) for key, value in info.items()}
    layers = {f"{parts.path}.{parts.layer}." for name in folder.mtp if (parts := split(name)) is not None}
    found[UNEXPECTED] = [
        name for name in found.get(UNEXPECTED, []) if name not in folder.mtp and not name.startswith(tuple(layers))
    ]
    return {key: value for key, value in found.items() if value}


def _loader(folder: ModelFolder) -> Any:
    native = folder.config.model_class
    return pruned_model_class(native) if folder.config.is_pruned else native


def _config(folder: ModelFolder) -> PreTrainedConfig:
    """Of the class that `_loader` takes; a new object."""
    if folder.config.is_pruned:
        config: PreTrainedConfig = read_pruned_config(floats(dict(folder.files.config)))
        return config
    return copy.deepcopy(folder.config.config)


def load(
    folder: Path, source: ModelFolder, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """(model, what transformers reports of the load: missing, unexpected and mismatched tensors, errors).

    Nothing but transformers' own classes is loaded, whatever the folder's auto_map says.

    Args:
        dtype: of all tensors; "auto" is what config.json says, to which wider ones are rounded.

    Raises:
        SecateurError: transformers cannot load it; the message names the file at fault.
    """
    given = {} if source.config.is_as_written else {"config": _config(source)}
    with no_loading_bars(), faults_named(folder, lambda: _reported(source)["mismatched_keys"]):
        model, info = _loader(source).from_pretrained(folder, output_loading_info=True, dtype=dtype, **given)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Those of the files lie anywhere in a mapped file, and matrix products round by alignment; what was stacked
            # of them is in memory of its own.
            if name in source.files.tensors or tensor.data_ptr() % ALIGNED:
                tensor.data = tensor.data.clone()
    return model, _problems(info, source)


def load_whole(source: ModelFolder, dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """The model of a folder, see `load`, with nothing missing and nothing left over.

    Raises:
        SecateurError: tensors are missing, unexpected or of another shape.
    """
    path = source.files.path
    model, problems = load(path, source, dtype)
    if problems:
        named = sorted(source.files.headers)
        weights = named[0] if len(named) == 1 else f"{named[0]} to {named[-1]}"
        raise SecateurError(f"{path}: {MISFIT} ({weights}), and transformers does not load it whole: {problems}"[:500])
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
