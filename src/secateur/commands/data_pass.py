"""A pass of a model over its data, for `observe` and `prune`: made ready and described, then taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.commands.bars import batches_bar, layers_bar
from secateur.commands.data_options import DataOptions

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
    show: bool,
    restart: bool = False,
    sums: Sequence[str] = (),
) -> Pass:
    """The pass that writes the statistics file `out`.

    Args:
        show: a bar. restart: throw away what an interrupted pass left, which else is gone on with. sums: to
            record beside those by default.

    Raises:
        SecateurError: the data or the model cannot be used, or not together.
    """
    from secateur.model_folder.read.modality import modality_of

    return KINDS[modality_of(folder)](folder, asked, out, device, show, restart, sums)


def _over_text(
    folder: ModelFolder, asked: DataOptions, out: Path, device: str, show: bool, restart: bool, sums: Sequence[str]
) -> Pass:
    from secateur.model_folder.measure.on_text import TextObservation

    drawn = asked.text(folder.files.path)
    run = TextObservation(
        folder,
        drawn,
        out,
        batch_size=asked.text_batch_size,
        activations="auto" if asked.activations is None else asked.activations.value,
        device=device,
        sums=sums,
    )

    def take() -> Observation:
        with layers_bar("observing", num_batches=asked.num_batches, show=show) as on_step:
            return run.observe(restart=restart, on_step=on_step)

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
        "goes_on": run.goes_on and not restart,
    }
    return Pass(data=data | {"batch_size": asked.text_batch_size}, about=about, take=take)


def _over_images(
    folder: ModelFolder, asked: DataOptions, out: Path, device: str, show: bool, restart: bool, sums: Sequence[str]
) -> Pass:
    from secateur.model_folder.measure.image_batches import MOST
    from secateur.model_folder.measure.on_images import ImageObservation

    run = ImageObservation(folder, asked.images(most=MOST), out, batch_size=asked.batch_size, device=device, sums=sums)

    def take() -> Observation:
        with batches_bar("observing", show=show) as on_step:
            return run.observe(on_step=on_step)

    about = {"layers": folder.config.num_layers, "moe_layers": list(folder.counts), "data": run.data}
    about["sums_bytes"] = run.sums_bytes
    return Pass(data=run.data, about=about, take=take)


KINDS = {"text": _over_text, "images": _over_images}
