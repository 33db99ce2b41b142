"""What finetune.json says: what was known before the first step, and what was measured on the way; and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from secateur.environment import hardware, versions
from secateur.files.json import read_object
from secateur.files.records import Count, Experts, Finite, Layer, as_record
from secateur.finetuning.model import Loaded
from secateur.finetuning.options import FinetuneOptions
from secateur.finetuning.settings import FinetuneSettings
from secateur.finetuning.task import Task
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.read.tensor_files import FINETUNED
from secateur.train.training_log import finite_or_none
from secateur.version import __version__

FORMAT, VERSION = "secateur-finetune", 1


class Loss(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training loss."""

    step: Count
    loss: Finite
    learning_rate: Finite | None
    grad_norm: Finite | None


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured on one domain; accuracy of images."""

    loss: Finite
    accuracy: Finite | None = None


class Evaluation(Measured, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mean of all domains, and each."""

    step: Count
    domains: dict[str, Measured]


class FinetuneFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """finetune.json. One of the two speeds is there, and is null of a run that was resumed after its last step."""

    format: Literal["secateur-finetune"]
    version: Literal[1]
    secateur: str
    name: str
    source: str
    model_type: str
    experts: dict[Layer, Experts]
    parameters: Count
    trained_parameters: Count
    router_aux_loss: dict[str, str | Finite] | None
    steps: Count
    warmup_steps: Count
    epochs: Finite
    data: dict[str, Any]
    options: FinetuneOptions
    versions: dict[str, str]
    hardware: dict[str, Any]
    losses: Annotated[tuple[Loss, ...], Meta(min_length=1, description="a list of training losses")]
    evaluations: tuple[Evaluation, ...]
    seconds: Finite
    resumed_after_step: Count | None
    peak_memory_bytes: Count
    tokens_per_second: Finite | None = None
    images_per_second: Finite | None = None


def read_record(path: Path) -> tuple[FinetuneFile, dict[str, Any]]:
    """What a finetune.json says, and the same as JSON.

    Raises:
        SecateurError: no such file, or something else in it.
    """
    data = read_object(path)
    return as_record(data, FinetuneFile, str(path)), data


def known(folder: ModelFolder, loaded: Loaded, task: Task, settings: FinetuneSettings) -> dict[str, Any]:
    """What is known before the first step, as JSON."""
    training = settings.training
    steps = training.num_steps(task.num_items)
    return {
        "format": FORMAT,
        "version": VERSION,
        "secateur": __version__,
        "name": folder.files.path.resolve().name,
        "source": str(folder.files.path),
        "model_type": folder.config.model_type,
        "experts": {str(layer): count for layer, count in folder.counts.items()},
        "parameters": loaded.num_parameters,
        "trained_parameters": loaded.num_trained,
        "router_aux_loss": _router_loss(folder, settings.model.router_aux_loss),
        "steps": steps,
        "warmup_steps": training.warmup_steps(steps),
        "epochs": steps / training.steps_per_epoch(task.num_items),
        "data": dict(task.about),
        "options": dict(settings.record.options),
        "versions": versions(),
        "hardware": hardware(),
    }


def _router_loss(folder: ModelFolder, asked: float | None) -> dict[str, Any] | None:
    """The weights of the losses that balance the experts, and who said so; None where there is none."""
    if asked is not None:
        return {"from": "option", "router_aux_loss": asked} if asked else None
    config = folder.config.text
    names = ["importance_loss_coef", "load_loss_coef"]
    if getattr(config, "output_router_logits", False):
        names += ["router_aux_loss_coef", "router_z_loss_coef"]
    weights = {name: getattr(config, name) for name in names if getattr(config, name, None)}
    return {"from": "config", **weights} if weights else None


def losses(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training losses of a Trainer's log, as JSON."""
    found = [line for line in history if "loss" in line]
    return [
        {key: finite_or_none(line.get(key)) for key in ("step", "loss", "learning_rate", "grad_norm")} for line in found
    ]


def evaluations(history: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """What was measured, by step: {"step", "loss", "domains": {name: {"loss", ...}}}, and "accuracy" of images.

    Args:
        sizes: items of every set that was measured on.
    """
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for line in history:
        for name in sizes:
            if f"eval_{name}_loss" in line:
                values = {key: line.get(f"eval_{name}_{key}") for key in ("loss", "accuracy")}
                steps.setdefault(line["step"], {})[name] = {k: v for k, v in values.items() if v is not None}
    return [{"step": step, **_mean(found, sizes), "domains": found} for step, found in steps.items()]


def _mean(found: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> dict[str, float]:
    total = sum(sizes[name] for name in found)
    keys = next(iter(found.values())).keys()
    return {key: sum(one[key] * sizes[name] for name, one in found.items()) / total for key in keys}


def with_section(card: str, record: Mapping[str, Any]) -> str:
    """A model card, or "" for none, that says at its end what was done after all that it tells."""
    trained = f"{record['steps']} steps on {', '.join(record['data']['train'])}"
    what = f"# Fine-tuned\n\nThese weights were fine-tuned from `{record['name']}` by `secateur finetune`: {trained}."
    if card:
        card = card.rstrip("\n") + "\n\n"
        what += " What this card says above of weights that were not changed is about the model before."
    return f"{card}{what}\n\n`{FINETUNED}` has the settings, the losses and the versions.\n"
