"""Observe what the experts of a model folder do on calibration data, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from secateur import families
from secateur.data.batch import Batch
from secateur.data.calibration import Calibration
from secateur.data.tokenizer import check_ids
from secateur.environment import resident_bytes, versions
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.files.progress import OnProgress, silent
from secateur.model_folder.read.facts import model_facts
from secateur.model_folder.read.load import UNSOUND, why_not_loaded
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.stream.resume import WorkFolder
from secateur.model_folder.stream.run import StreamedModel
from secateur.model_folder.stream.states import DiskStates, MemoryStates
from secateur.observation.activations import LayerObserver, check_observable
from secateur.observation.observation import Observation
from secateur.observation.shown import axis_sizes
from secateur.stats import DEFAULT_SUMS, LayerStats, RouterStats, recorded
from secateur.stats.sums import bytes_of

Activations = Literal["auto", "memory", "disk"]
LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions")
STACKING = 5 / 3  # of a layer's bytes: all read, and two thirds stacked anew, when most of it is in memory
FIRST_FORWARD = 2**26  # bytes of code and buffers that torch loads when it first computes; 15 MB were seen
SMALL = 2**30  # bytes of hidden states that stay in memory by themselves


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an observation takes, before it begins.

    read_bytes: from the files. hidden_bytes: of the hidden states between two layers. peak_bytes: of memory, about,
    without what the forward of one batch needs: `process_bytes`, tensors outside the layers, the largest layer while it
    is stacked, and the hidden states if they stay in memory, and with those sums. process_bytes: what Python, torch and
    the data take, as this process is now. in_memory: whether hidden states do. sums_bytes: of the sums that are
    recorded on request, of all layers.
    """

    num_layers: int
    moe_layers: Sequence[int]
    num_tokens: int
    read_bytes: int
    hidden_bytes: int
    peak_bytes: int
    process_bytes: int
    in_memory: bool
    sums_bytes: int


class TextObservation:
    """One observation of a model folder: `costs` says what it takes, `observe` does it."""

    def __init__(
        self,
        folder: ModelFolder,
        data: Calibration,
        out: Path,
        *,
        batch_size: int = 8,
        activations: Activations = "auto",
        device: str = "cpu",
        sums: Sequence[str] = (),
        is_new: bool = False,
    ) -> None:
        """
        Args:
            out: the file that `observe` writes. activations: where hidden states wait between layers. In memory they
                are lost with the process; auto takes that for a model that would fit in memory as a whole, where a run
                is soon done again, and the disk for others. sums: names in `stats.SUMS` to record beside those by
                default. is_new: `out` is not written over, unless by an interrupted run that goes on.

        Raises:
            SecateurError: a family that cannot be observed, a quantised or damaged model, sequences longer than the
                model takes, or tokens that it does not know; no such sum, or one that these experts do not show.
        """
        if batch_size < 1:
            raise SecateurError(f"--batch-size {batch_size}, expected at least 1")
        _check_family(folder)
        _check_tokens(folder, data)
        self._found, self._data, self._batch_size, self._device = folder, data, batch_size, device
        self._streamed = StreamedModel(folder, device=device)
        self._blocks = dict(describe_moe(self._streamed.text).blocks)
        self._sums = [name for name in recorded(sums) if name not in DEFAULT_SUMS]
        for block in self._blocks.values():
            check_observable(block, self._sums)
        self._work = WorkFolder(out)
        self._out, self._is_new = out, is_new
        self.costs = self._costs(activations)

    @property
    def goes_on(self) -> bool:
        """Whether an interrupted run has left something to go on from."""
        return self._work.is_begun

    def observe(self, *, restart: bool = False, on_step: OnProgress = silent) -> Observation:
        """Run all layers and write the statistics file; with hidden states on the disk, go on where a run was killed.

        The result has the bytes of a run that was not interrupted.

        Args:
            restart: begin anew, whatever an interrupted run left. on_step: see `StreamedModel.run_layers`.

        Raises:
            SecateurError: another process writes the same file, an interrupted run was of something else, or layers
                compute what is not finite.
            OSError: the disk refused; nothing half-written has the name of the result.
        """
        if restart:
            self._work.discard()
        batches = self._data.batches(self._batch_size)
        if self.costs.in_memory and not self.goes_on:
            stats: dict[int, LayerStats] = {}
            self._streamed.run_layers(batches, MemoryStates(), visit=self._visit(stats.__setitem__), on_step=on_step)
            return self._written(stats)
        with self._work.opened(self._identity()) as on_written:
            if on_written is None:
                return Observation.load(self._out)
            states = DiskStates(self._work.states)
            self._streamed.run_layers(batches, states, visit=self._visit(self._work.save_layer), on_step=on_step)
            observation = self._written({layer: self._work.load_layer(layer) for layer in self._blocks})
            on_written()
            return observation

    def _visit(self, save: Callable[[int, LayerStats], None]) -> Any:
        @contextmanager
        def visit(layer: int, module: nn.Module) -> Iterator[Callable[[Batch], None]]:
            observer = LayerObserver(self._blocks[layer], sums=self._sums)
            try:
                yield lambda batch: observer.start(batch.attention_mask)
                try:
                    stats = observer.read()
                except SecateurError as error:
                    raise SecateurError(f"{self._found.files.path}: {error}; {UNSOUND}") from error
                save(layer, stats)
            finally:
                observer.detach()

        return lambda layer, module: visit(layer, module) if layer in self._blocks else nullcontext(lambda batch: None)

    def _written(self, stats: Mapping[int, LayerStats]) -> Observation:
        observation = Observation(
            stats=RouterStats(layers=dict(stats)),
            model=model_facts(self._found),
            data={**self._data.to_json(), "batch_size": self._batch_size, "versions": versions()},
        )
        self._found.files.check_unchanged(read=self._found.files.model_files)
        if self._is_new and self._out.exists() and not Observation.load(self._out).is_same(observation):
            raise SecateurError(f"--out {self._out}: it is there already, and not from this run; take it away")
        observation.save(self._out)
        return observation

    def _identity(self) -> dict[str, Any]:
        """What decides the result; the files of the model by size and time, as reading them takes as long as a run."""
        folder = self._found.files
        files = {name: (folder.path / name).stat() for name in folder.headers}
        return {
            "model": model_facts(self._found).digest,
            "config": folder.config_digest,
            "files": {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()},
            "data": self._data.to_json(),
            "batch size": self._batch_size,
            "device": self._device,
            "sums": self._sums,
            "versions": versions(),
        }

    def _costs(self, activations: Activations) -> Costs:
        sizes = self._streamed.part_bytes()
        outside, _ = sizes.pop("outside"), sizes.pop("head")
        width = int(self._found.config.text.hidden_size)
        hidden = sum(batch.input_ids.numel() for batch in self._data.batches(self._batch_size)) * width
        hidden *= self._streamed.dtype.itemsize
        loaded = outside + round(STACKING * max(sizes.values()))
        is_small = hidden <= SMALL and why_not_loaded(self._found) is None
        in_memory = activations == "memory" or (activations == "auto" and is_small)
        process = resident_bytes() + FIRST_FORWARD
        sums = sum(bytes_of(self._sums, axis_sizes(block, width)) for block in self._blocks.values())
        return Costs(
            num_layers=self._streamed.num_layers,
            moe_layers=sorted(self._blocks),
            num_tokens=self._data.num_tokens,
            read_bytes=outside + sum(sizes.values()),
            hidden_bytes=hidden,
            peak_bytes=process + loaded + sums + (hidden if in_memory else 0),
            process_bytes=process,
            in_memory=in_memory,
            sums_bytes=sums,
        )


def _check_family(folder: ModelFolder) -> None:
    for model_type in (folder.config.model_type, folder.config.text.model_type):
        if model_type in families.REFUSED:
            raise SecateurError(f"model type {model_type!r} cannot be observed: {families.REFUSED[model_type]}")


def _check_tokens(folder: ModelFolder, data: Calibration) -> None:
    text = folder.config.text
    longest, largest = max(map(len, data.sequences)), max(int(sequence.max()) for sequence in data.sequences)
    for key in LENGTH_KEYS:
        most = getattr(text, key, None)
        if type(most) is int and longest > most:
            raise SecateurError(
                f"{folder.files.path}: sequences of {longest} tokens, but the model takes at most {most} ({key} in "
                "config.json)"
            )
    check_ids(largest, int(text.vocab_size), folder.files.path)
