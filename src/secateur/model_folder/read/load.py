"""Load a pruned folder and its source, and compare what they compute: the checks that need the models in memory."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from secateur.errors import SecateurError
from secateur.families import logits_of
from secateur.files.bytes_in_words import in_words
from secateur.files.json import read_object
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.modeling_secateur import MODEL_TYPE, pruned_model_class
from secateur.plans import Plan

NEW_TOKENS = 4  # that the pruned model generates
ROUNDING = 1e-4  # of the largest logit, where experts changed places and sums are taken in another order


def why_not_loaded(survey: ModelFolder) -> str | None:
    """Why a model cannot be run here; None where it can."""
    config = survey.folder.config
    if any(key in config for key in ("quantization_config", "compression_config")):
        return "it is quantised, and its experts are compared as bytes only"
    need, free = survey.folder.num_bytes, _free_memory()
    if need > free:
        return f"it needs {in_words(need)} of memory, {in_words(free)} are free"
    return None


def _free_memory() -> int:
    """Bytes that a process can still have: of Linux, else all that the machine has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    folder: Path, survey: ModelFolder, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """(model, what transformers reports of the load: missing, unexpected and mismatched tensors, errors).

    Nothing but transformers' own classes is loaded, whatever the folder's auto_map says.

    Args:
        dtype: of all tensors; "auto" is what config.json says, to which wider ones are rounded.
    """
    pruned = survey.folder.config.get("model_type") == MODEL_TYPE
    native = survey.model.model_class
    loader: Any = pruned_model_class(native) if pruned else native
    with no_loading_bars():
        model, info = loader.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    with torch.no_grad():
        for tensor in model.parameters():  # they lie anywhere in a mapped file, and matrix products round by alignment
            tensor.data = tensor.data.clone()
    return model, {key: sorted(map(str, value)) for key, value in info.items() if value}


def sample_for(folder: Path, survey: ModelFolder, num_tokens: int, text: Path | None, seed: int) -> Tensor:
    """What the models are run on: (1, num_tokens) token ids, of a text through the folder's tokenizer or random ones.

    For a model of images, the random pixels of as many images as it takes to have `num_tokens` patches.
    """
    generator = torch.Generator().manual_seed(seed)
    config = survey.model.text
    if survey.model.model_class.main_input_name == "pixel_values":
        if text is not None:
            raise SecateurError(f"--text {text}: a {survey.model.model_type!r} model reads images; leave it out")
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


def logits_without_dropped(folder: Path, survey: ModelFolder, plan: Plan, sample: Tensor) -> Tensor:
    """Logits of the source without the experts that the plan drops, in the plan's meaning of that."""
    from secateur.model_folder.oracle import without_dropped

    model, _ = load(folder, survey)
    with without_dropped(model, survey, plan):
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


def applied_plan(pruned: Path) -> tuple[Plan, str | None]:
    """(plan of the last step, what became of MTP layers) from the report in a pruned folder."""
    report = read_object(pruned / "report.json")
    mtp = report.get("mtp")
    try:
        return Plan.from_json(report["plan"]), mtp if isinstance(mtp, str) else None
    except KeyError as error:
        raise SecateurError(f"{pruned / 'report.json'}: it has no plan; expected the report of `apply`") from error


def text_model(model: PreTrainedModel, survey: ModelFolder) -> PreTrainedModel:
    """The model that holds the decoder layers: `model` itself, or one inside it."""
    if not survey.model.is_nested:
        return model
    wanted = survey.model.text.model_type
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type == wanted:
            return module
    raise SecateurError(f"{type(model).__name__}: no {wanted} model inside it")
