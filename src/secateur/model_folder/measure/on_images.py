"""Observe what the experts of a V-MoE do on images: the model as a whole, batch by batch.

Text models are read layer by layer because they may be larger than memory. V-MoE-B/16 with 8 experts takes 1.2 GB; a
model of images that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.environment import versions
from secateur.errors import SecateurError, foreign
from secateur.families import describe_moe
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.measure.image_batches import ImageBatches, SampledImages, batches_for
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.load import CANNOT_RUN, UNSOUND, load_whole, why_not_loaded
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.observation.activations import ActivationObserver
from secateur.observation.observation import Observation
from secateur.observation.shown import needs_neurons
from secateur.stats import DEFAULT_SUMS, SUMS, recorded
from secateur.stats.sums import NO_NEURONS, ONLY_PAIRS, bytes_of


class ImageObservation:
    """One observation of a model folder: `data` says on what, `sums_bytes` what further sums take, `observe` does it.

    Nothing is kept for a restart.
    """

    def __init__(
        self,
        folder: ModelFolder,
        drawn: SampledImages,
        out: Path,
        *,
        batch_size: int | None = None,
        device: str = "cpu",
        sums: Sequence[str] = (),
    ) -> None:
        """
        Args:
            out: the file that `observe` writes. batch_size: images that go through the model together. sums: names in
                `stats.SUMS` to record beside those by default.

        Raises:
            SecateurError: see `batches_for` and `check_fits_in_memory`; no such sum, or one inside the experts.
        """
        check_fits_in_memory(folder)
        self._found, self._out, self._device = folder, out, device
        self._sums = [name for name in recorded(sums) if name not in DEFAULT_SUMS]
        if needs_neurons(self._sums):
            raise SecateurError(f"{folder.files.path}: {NO_NEURONS}")
        if any(SUMS[name].axes == "EE" for name in self._sums):
            raise SecateurError(f"{folder.files.path}: {ONLY_PAIRS}")
        width = int(folder.config.text.hidden_size)
        self.sums_bytes = sum(bytes_of(self._sums, {"E": count, "D": width}) for count in folder.counts.values())
        self.batches: ImageBatches = batches_for(folder, drawn.images, batch_size)
        self.data: dict[str, Any] = drawn.about | {"batch_size": self.batches.size}

    def observe(self, *, on_step: OnProgress = silent) -> Observation:
        """Run the model on all images and write the statistics file.

        Raises:
            SecateurError: the model computes what is not finite.
            OSError: the disk refused; nothing half-written has the name of the result.
        """
        model = loaded(self._found, self._device)
        observer = ActivationObserver(describe_moe(model), sums=self._sums)
        with torch.no_grad():
            for step, (pixel_values, _) in enumerate(self.batches, start=1):
                with foreign(f"{self._found.files.path}: {CANNOT_RUN}"):
                    model(pixel_values=pixel_values.to(self._device))
                on_step(step, len(self.batches))
        try:
            stats = observer.read()
        except SecateurError as error:
            raise SecateurError(f"{self._found.files.path}: {error}; {UNSOUND}") from error
        observation = Observation(
            stats=stats, model=model_facts(self._found), data={**self.data, "versions": versions()}
        )
        self._found.files.check_unchanged(read=self._found.files.model_files)
        observation.save(self._out)
        return observation


def check_fits_in_memory(folder: ModelFolder) -> None:
    """Raises SecateurError: the model cannot be loaded here as a whole."""
    why = why_not_loaded(folder)
    if why is not None:
        raise SecateurError(f"{folder.files.path}: models of images are loaded whole; {why}")


def loaded(folder: ModelFolder, device: str) -> PreTrainedModel:
    """The model of a folder, in evaluation mode.

    Raises:
        SecateurError: tensors are missing or left over.
    """
    model = load_whole(folder)
    model.to(device).eval()  # type: ignore[arg-type]
    return model
