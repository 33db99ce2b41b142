"""A pass of a model over its data, for `observe` and `prune`: made ready and described, then taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.files.progress import OnProgress, OnStage, silent, stage
from secateur.model_folder.measure.data_choice import DataOptions

if TYPE_CHECKING:
    from secateur.model_folder.read.model_folder import ModelFolder
    from secateur.observation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Pass:
    """data: what the model is run on; about: what that takes; both as JSON. take: does it and writes the statistics."""

    data: dict[str, Any]
    about: dict[str, Any]
    take: Callable[[], Observation]


def prepare(
    folder: ModelFolder,
    asked: DataOptions,
    out: Path,
    *,
    device: str,
    restart: bool = False,
    sums: Sequence[str] = (),
    is_new: bool = False,
    on_stage: OnStage | None = None,
) -> Pass:
    """The pass that writes the statistics file `out`.

    Args:
        restart: throw away what an interrupted pass left, which else is gone on with. sums: to record beside those by
            default. is_new: see `TextObservation`.
        on_stage: called with ("observing", batches done, batches in all); of text by layer, see `by_layer`.

    Raises:
        SecateurError: the data or the model cannot be used, or not together.
    """
    from secateur.model_folder.read.modality import modality_of

    return KINDS[modality_of(folder)](folder, asked, out, device, restart, sums, is_new, on_stage)


def by_layer(what: str, num_batches: int, on_stage: OnStage | None) -> OnProgress:
    """What is called with (layers x batches done, in all), so that `on_stage` also hears the layer."""
    if on_stage is None:
        return silent

    def step(done: int, total: int) -> None:
        layers = total // num_batches
        layer = min(done // num_batches + 1, layers)
        on_stage(what if layers == 1 else f"{what}, layer {layer} of {layers}", done, total)

    return step


def _over_text(
    folder: ModelFolder,
    asked: DataOptions,
    out: Path,
    device: str,
    restart: bool,
    sums: Sequence[str],
    is_new: bool,
    on_stage: OnStage | None,
) -> Pass:
    from secateur.model_folder.measure.on_text import TextObservation

    drawn = asked.text(folder.files.path)
    run = TextObservation(
        folder,
        drawn,
        out,
        batch_size=asked.text_batch_size,
        activations=asked.activations or "auto",
        device=device,
        sums=sums,
        is_new=is_new,
    )
    on_step = by_layer("observing", asked.num_batches, on_stage)
    data, costs = drawn.to_json(), run.costs
    about = {
        "layers": costs.num_layers,
        "moe_layers": costs.moe_layers,
        "mtp_layers_not_run": list(folder.mtp_counts),
        "data": data,
        "bytes_to_read": costs.read_bytes,
        "activation_bytes": costs.hidden_bytes,
        "activations": "memory" if costs.in_memory else "disk",
        "sums_bytes": costs.sums_bytes,
        "peak_memory_bytes_estimated": costs.peak_bytes,
        "process_memory_bytes": costs.process_bytes,
        "goes_on": run.goes_on and not restart,
    }
    return Pass(
        data=data | {"batch_size": asked.text_batch_size},
        about=about,
        take=lambda: run.observe(restart=restart, on_step=on_step),
    )


def _over_images(
    folder: ModelFolder,
    asked: DataOptions,
    out: Path,
    device: str,
    restart: bool,
    sums: Sequence[str],
    is_new: bool,
    on_stage: OnStage | None,
) -> Pass:
    from secateur.model_folder.measure.image_batches import MOST
    from secateur.model_folder.measure.on_images import ImageObservation

    run = ImageObservation(folder, asked.images(most=MOST), out, batch_size=asked.batch_size, device=device, sums=sums)
    about = {"layers": folder.config.num_layers, "moe_layers": list(folder.counts), "data": run.data}
    about["sums_bytes"] = run.sums_bytes
    return Pass(data=run.data, about=about, take=lambda: run.observe(on_step=stage("observing", on_stage)))


KINDS = {"text": _over_text, "images": _over_images}
