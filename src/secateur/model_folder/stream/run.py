"""Run a model folder layer by layer: what is in memory at a time is one decoder layer and what lies outside them.

Every layer is loaded once, all batches go through it, and it is released; what a visitor sees of it, and the logits at
the end, are bit for bit those of the whole model. What does not fit in memory this way: the tensors outside the layers
(embedding, LM head), one layer - for a while up to twice, where experts are rearranged otherwise than `placed` does -,
the hidden states of all batches unless they are kept on the disk, and what a forward of one batch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batch import Batch
from secateur.errors import SecateurError, foreign
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.read.load import CANNOT_RUN, UNSOUND
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.stream.lazy_tensor import Span
from secateur.model_folder.stream.parts import PartModel
from secateur.model_folder.stream.relay import Relay
from secateur.model_folder.stream.shared import NOTHING
from secateur.model_folder.stream.states import States

# (layer's number, layer) -> what is in force while it is loaded, which gives what is called before each batch
Visit = Callable[[int, nn.Module], AbstractContextManager[Callable[[Batch], None]]]
ALL_OF_ALL: Mapping[str, Sequence[Span]] = MappingProxyType({})


class StreamedModel:
    """A model folder of which one decoder layer at a time is in memory.

    model: the whole model, in evaluation mode, its tensors on the meta device unless they are loaded. text: the model
    that the decoder layers are in, `model` or inside it. layers_path: where in `model` they are.
    """

    def __init__(
        self, folder: ModelFolder, *, device: str = "cpu", spans: Mapping[str, Sequence[Span]] = ALL_OF_ALL
    ) -> None:
        """
        Args:
            device: where layers run; hidden states wait on the host.
            spans: what is read of the tensors that it names, in the files: (first byte, bytes) each. The rest of them
                is 0.

        Raises:
            SecateurError: a quantised model, or a tensor that is missing, unknown or of a type to be decoded first.
        """
        self._parts, self._device, self._found = PartModel(folder, device, spans), device, folder
        self.model, self.text, self.layers_path = self._parts.model, self._parts.text, self._parts.layers_path
        self.num_layers, self.dtype = len(self._parts.layers), self._parts.dtype

    def part_bytes(self) -> dict[str | int, int]:
        """Bytes in the files: "outside" the layers, of an LM head that is not tied, and of each layer by its number."""
        return self._parts.part_bytes()

    @torch.no_grad()
    def run_layers(
        self,
        batches: Sequence[Batch],
        states: States,
        *,
        visit: Visit | None = None,
        on_step: OnProgress = silent,
    ) -> None:
        """Send all batches through all layers; `states` has what the last one returned when this ends.

        Args:
            batches: gone over once a layer.
            states: empty, or of the same model and batches by a run that was interrupted; it goes on from there.
            visit: entered once a layer, when it is loaded.
            on_step: called with (layers x batches done, in all).

        Raises:
            SecateurError: layers that exchange more than hidden states, a tensor that is missing, values that are not
                finite, and the message names the layer; or files of the model were changed.
        """
        done, total = states.first * len(batches), self.num_layers * len(batches)
        relay = Relay(self._parts.layers, states.form)
        with self._parts.outside(), relay.installed():
            for number in range(states.first, self.num_layers):
                on_step(done, total)
                with self._parts.layer(number) as module, visit(number, module) if visit else _unseen() as before_batch:
                    for index, batch in enumerate(batches):
                        before_batch(batch)
                        hidden = self._through(relay, number, index, batch, states)
                        states.put(number + 1, index, hidden, relay.shared)
                        done += 1
                        on_step(done, total)
                    # before anything of this layer counts as done, from which an interrupted run goes on
                    self._found.files.check_unchanged(read=self._found.files.model_files)
                states.form = relay.form
                states.finish(number + 1)

    @torch.no_grad()
    def run_head(
        self,
        batches: Sequence[Batch],
        states: States,
        use: Callable[[int, Batch, Tensor], None],
        *,
        on_step: OnProgress = silent,
    ) -> None:
        """After `run_layers`: norm and LM head, through the model's own forward.

        Args:
            use: called with (number of the batch, batch, logits (B, S, V)) in the model's type and on its device.
            on_step: called with (batches done, in all).

        Raises:
            SecateurError: what follows the layers depends on more than the last one.
        """
        relay = Relay(self._parts.layers, states.form)
        with self._parts.outside(), self._parts.head(), relay.installed():
            for index, batch in enumerate(batches):
                output, _ = self._run(relay, self.num_layers, index, batch, states)
                if not bool(_real(output.logits, batch).isfinite().all()):
                    raise SecateurError(
                        f"{self._name}: its logits are not finite, or need more than the last layer; {UNSOUND}"
                    )
                use(index, batch, output.logits)
                on_step(index + 1, len(batches))

    def _through(self, relay: Relay, number: int, index: int, batch: Batch, states: States) -> Tensor:
        _, hidden = self._run(relay, number, index, batch, states)
        if not bool(_real(hidden, batch).isfinite().all()):
            raise SecateurError(
                f"{self._name}: what decoder layer {number} hands on is not finite; {UNSOUND}, or the next layer is "
                "given more than its output"
            )
        return hidden

    def _run(self, relay: Relay, stage: int, index: int, batch: Batch, states: States) -> tuple[Any, Tensor]:
        given, shared = states.get(stage, index) if stage else (None, NOTHING)
        given = None if given is None else given.to(self._device)
        moved = batch.to(self._device)
        try:
            with foreign(f"{self._name}: {CANNOT_RUN}"):
                return relay.run(stage, given, lambda: self._call(moved), checks=index == 0, shared=shared)
        except SecateurError as error:
            told = str(error)
            raise SecateurError(told if told.startswith(self._name) else f"{self._name}: {told}") from error

    def _call(self, batch: Batch) -> Any:
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    @property
    def _name(self) -> str:
        return f"{self._found.files.path} ({self._found.config.model_type})"


def _unseen() -> AbstractContextManager[Callable[[Batch], None]]:
    return nullcontext(lambda batch: None)


def _real(values: Tensor, batch: Batch) -> Tensor:
    """(B, S, ...) values of tokens that are not padding, which may be anything."""
    mask = batch.attention_mask
    return values if mask is None or values.shape[:2] != mask.shape else values[mask.bool().to(values.device)]
