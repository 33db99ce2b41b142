"""Accuracy of one or several V-MoE folders on the same images, and what an image costs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.images import Images
from secateur.errors import SecateurError, foreign
from secateur.families import MoEModel, describe_moe
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.evaluation.accuracy import Scores, difference, joined, scores, summary
from secateur.model_folder.measure.image_batches import ImageBatches, batches_for
from secateur.model_folder.measure.on_images import check_fits_in_memory, loaded
from secateur.model_folder.read.load import CANNOT_RUN
from secateur.model_folder.read.modality import class_names
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.models.vmoe.flops import flops_per_image
from secateur.models.vmoe.modeling import VMoEForImageClassification
from secateur.observation.call import read_index


def evaluate_images(
    models: Sequence[Path],
    images: Images,
    *,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_step: Callable[[Path], OnProgress] = lambda model: silent,
) -> list[dict[str, Any]]:
    """The results of every model, as JSON: those of `accuracy.summary`, "members" the same of an ensemble's members
    (their mean), what an image costs, and the "difference" from the first.

    Args:
        batch_size: images that go through a model together; see `batches_for`. seed: of the bootstrap.
        on_step: gives for a model what is called with (batches done, batches in all).

    Raises:
        SecateurError: see `check_models` and `batches_for`; or images that are not of the models' classes.
    """
    surveys = check_models(models)
    batches = {model: batches_for(found, images, batch_size) for model, found in surveys.items()}
    for model, found in surveys.items():  # what does not fit shows before another is measured
        images.check_classes(class_names(found), model)
    results: list[dict[str, Any]] = []
    first: Scores | None = None
    for model, found in surveys.items():
        measured, about = _measured(found, batches[model], device, on_step(model))
        results.append({
            "path": str(model),
            "model_type": found.config.model_type,
            "experts": sum(found.counts.values()),
            "bytes": found.files.num_bytes,
            "images": len(images),
            "batch_size": batches[model].size,
            **summary(measured),
            **about,
            "difference": None if first is None else difference(measured, first, seed=seed),
        })  # fmt: skip
        first = first or measured
    return results


def check_models(models: Sequence[Path]) -> dict[Path, ModelFolder]:
    """The folders, all of which can be run here and compared with each other.

    Raises:
        SecateurError: no such model, one that cannot be run here, or has no classifier, or other classes.
    """
    surveys = {model: read_model_folder(model) for model in models}
    first, *_ = models
    for model, found in surveys.items():
        check_fits_in_memory(found)
        native = found.config.model_class
        if not issubclass(native, VMoEForImageClassification):
            raise SecateurError(
                f"{model}: a {native.__name__}, expected a VMoEForImageClassification; without a classifier no label "
                "can be compared"
            )
        number, expected = (len(class_names(one)) for one in (found, surveys[first]))
        if number != expected:
            raise SecateurError(
                f"{model}: it tells {number} classes, {first} {expected}; expected models of the same classes"
            )
    return surveys


def _measured(
    folder: ModelFolder, batches: ImageBatches, device: str, on_step: OnProgress
) -> tuple[Scores, dict[str, Any]]:
    model: Any = loaded(folder, device)
    moe = describe_moe(model, zero_slots=True)
    parts: list[Scores] = []
    members: list[Scores] = []
    seconds: list[float] = []
    with torch.no_grad(), _counted_pairs(moe) as pairs:
        for step, (pixel_values, labels) in enumerate(batches, start=1):
            pixel_values = pixel_values.to(device)
            begin = _now(device)
            with foreign(f"{folder.files.path}: {CANNOT_RUN}"):
                output = model(pixel_values=pixel_values)
            seconds.append(_now(device) - begin)
            parts.append(scores(output.logits, labels))
            if output.member_logits is not None:
                members.append(scores(output.member_logits, labels))
            on_step(step, len(batches))
    number = len(batches.images)
    rows = {layer: len(next(block.router.parameters())) for layer, block in moe.blocks.items()}
    each = {layer: int(count) / number for layer, count in pairs.items()}
    flops = flops_per_image(model.config, router_rows=rows, pairs=each)
    about = {
        "members": summary(joined(members)) if members else None,
        "parameters": moe.num_parameters,
        "flops_per_image": sum(flops.values()),
        "flops_by_part": flops,
        "pairs_per_image": {str(layer): count for layer, count in each.items()},
        "images_per_second": _speed(number, batches.size, seconds),
    }
    del model, moe, output
    gc.collect()
    return joined(parts), about


def _speed(number: int, size: int, seconds: Sequence[float]) -> float:
    """Of the forward passes; the first, which makes ready, does not count where there are others."""
    return (number - size) / sum(seconds[1:]) if len(seconds) > 1 else number / seconds[0]


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _counted_pairs(moe: MoEModel) -> Iterator[Mapping[int, int | Tensor]]:
    """{MoE layer: pairs that its experts computed} while it lasts; zero slots compute nothing."""
    counts: dict[int, int | Tensor] = dict.fromkeys(moe.blocks, 0)

    def counter(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        kept, name = moe.kept.get(layer), f"{moe.blocks[layer].name}.experts"

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slots = read_index(name, args, kwargs)  # the device is not waited for
            computed = (
                slots.numel() if kept is None else torch.isin(slots, torch.tensor(kept, device=slots.device)).sum()
            )
            counts[layer] = counts[layer] + computed

        return count

    handles = [
        block.experts.register_forward_pre_hook(counter(layer), with_kwargs=True) for layer, block in moe.blocks.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
