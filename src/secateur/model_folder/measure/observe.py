"""Record what the experts of a model folder do: on text, on images, or as another engine counted it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import SecateurError
from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.new_file import check_new_file
from secateur.files.new_folder import IS_THERE
from secateur.files.progress import OnStage
from secateur.model_folder.measure.data_choice import Activations, DataOptions, device_named
from secateur.model_folder.measure.data_pass import prepare
from secateur.model_folder.read.model_folder import ModelFolder, read_model_folder
from secateur.results import Written

if TYPE_CHECKING:
    from secateur.observation.observation import Observation

FORMAT, VERSION = "secateur-observe", 1


@dataclass(frozen=True, kw_only=True)
class Observed(Written):
    """What `observe` did, or in a dry run would do.

    Args:
        out: the statistics file. model: the folder.
        observation: the statistics with their origin; None in a dry run, which does not run the model.
        moe_layers: the layers that they are of.
        never_routed: {layer: experts that no token reached}; layers without such experts are left out.
    """

    model: Path
    observation: Observation | None = field(repr=False, compare=False)
    moe_layers: tuple[int, ...]
    never_routed: Mapping[int, tuple[int, ...]]

    def table(self) -> Any:
        rows = [("model", self.model), ("statistics", self.out), ("MoE layers", self.moe_layers)]
        if self.observation is not None:
            rows += [("tokens of a layer", next(iter(self.observation.stats.layers.values())).num_tokens)]
            rows += [("experts without a token", self.never_routed or "none")]
        return ("", "value"), rows


def observe(
    model: StrPath,
    out: StrPath,
    *,
    data: StrPaths | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    pack: bool | None = None,
    text_key: str | None = None,
    split: str | None = None,
    activations: Activations | None = None,
    device: str = "auto",
    sums: str | Sequence[str] | None = None,
    sglang: StrPath | None = None,
    experts_from: Literal["config", "files"] = "config",
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
) -> Observed:
    """Run a model on text, or a V-MoE on images, and record what its experts do, for all criteria at once.

    One decoder layer at a time is in memory, so the model may be larger than that. A run that was killed goes on at
    the layer it had reached when it is started again with the same arguments. Layers that predict further tokens
    (multi-token prediction) are not run.

    Args:
        model: the folder of a Hugging Face model; it is only read.
        out: the statistics file to write, such as stats.safetensors.
        data: text: files, folders, globs, .jsonl with chat messages, or hf:NAME, after domain= if it shall count as
            that; Python's own standard library and its reference without it. Images: a folder with one subfolder a
            class, or an .npz with images and labels.
        samples: sequences, 128 without it; or images, without it all up to 10,000.
        sequence_length: tokens of a sequence, 512 without it. Text only.
        seed: draws the sequences, or the images and their order.
        batch_size: sequences, 8 without it, or images, 64, that go through together.
        pack: join documents and cut blocks (the default), or one document a sequence, padded. Text only.
        text_key: where the text is in .jsonl, .parquet, hf:; "text" without it. Text only.
        split: of an hf: dataset, "train" without it. Text only.
        activations: where hidden states wait between layers: disk (beside `out`; a killed run goes on from there),
            memory, or auto, the default: memory for a model that would fit there as a whole. Text only.
        device: where the model, or its layers, run: auto, cpu, cuda.
        sums: further sums to record, such as output_sum; see docs/observe.md.
        sglang: run nothing; take the counts that SGLang recorded in this .pt file.
        experts_from: what says how many experts a layer has: config (config.json), or files, for a model that a tool
            pruned without updating its config.json.
        force: write over `out` if it is there. restart: throw away what an interrupted run left.
        dry_run: check everything and say what it takes.
        on_progress: called with ("observing, layer 2 of 24", batches done, batches in all); of images without a layer.

    Returns:
        The statistics, where they are, and what they are of. Where `out` holds those of the recording already,
        it is left as it is, and "is_there" is in `to_json()`.

    Raises:
        SecateurError: the model or the data cannot be used, or not together, or `out` is not free.
        OSError: the disk refused; nothing half-written has the name of the result.

    Example:
        >>> seen = secateur.observe("models/Qwen3-30B-A3B", "stats.safetensors", data=["code=src", "chats.jsonl"])
        >>> seen.observation.stats.layers[0].num_tokens
        65536
    """
    check_given(observe, locals())
    model, out = Path(model), Path(out)
    recording = None if sglang is None else Path(sglang)
    asked = DataOptions(
        data=as_texts(data),
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        pack=pack,
        text_key=text_key,
        split=split,
        seed=seed,
        activations=activations,
    )
    is_ours = out.is_file() and not restart and recording is None and _is_of_a_killed_run(out)
    there = None if force or recording is None else _observation_at(out)
    sources = [source for source in (model, recording) if source is not None]
    check_new_file(out, force or is_ours or there is not None, *sources)
    if recording is not None and asked.data:
        raise SecateurError("--sglang and --data: a recording needs no text")
    if recording is not None and sums:
        raise SecateurError("--sglang and --sums: a recording holds counts only")
    folder = read_model_folder(model, experts_from)
    observation: Observation | None
    if recording is not None:
        about, observation = _recorded(folder, recording)
        if there is not None and there.is_same(observation):
            about[IS_THERE] = True
        else:
            check_new_file(out, force, *sources)
            if not dry_run:
                observation.save(out)
    else:
        ready = prepare(
            folder,
            asked,
            out,
            device=device_named(device),
            restart=restart,
            sums=as_texts(sums),
            is_new=not force,
            on_stage=on_progress,
        )
        about = ready.about
        observation = None if dry_run else ready.take()
    seen = {} if observation is None else _seen(observation)
    return Observed(
        out=out,
        model=model,
        observation=observation,
        moe_layers=tuple(about["moe_layers"]),
        never_routed={int(layer): tuple(experts) for layer, experts in seen.get("never_routed", {}).items()},
        content={
            "format": FORMAT,
            "version": VERSION,
            "model": str(model),
            "out": str(out),
            **about,
            **seen,
            "dry_run": dry_run,
        },
    )


def _is_of_a_killed_run(out: Path) -> bool:
    """Whether a run for this file was killed; it may have been after the file was written."""
    from secateur.model_folder.stream.resume import WorkFolder

    work = WorkFolder(out)
    work.remove_empty()
    return work.is_begun


def _observation_at(path: Path) -> Observation | None:
    """The statistics in a file; None where it is not there or holds something else."""
    from secateur.observation.observation import Observation

    try:
        return Observation.load(path) if path.is_file() else None
    except SecateurError:
        return None


def _recorded(folder: ModelFolder, path: Path) -> tuple[dict[str, Any], Observation]:
    """What there is to say of a recording of SGLang, as JSON, and the statistics."""
    from secateur.model_folder.read.facts import model_facts
    from secateur.observation.observation import Observation
    from secateur.observation.sglang import read_recording, stats_of_recording

    recorded, about = read_recording(path)
    model = folder.config
    stats = stats_of_recording(
        recorded, folder.counts, num_layers=model.num_layers, top_k=model.top_k, where=f"recording {path}"
    )
    observation = Observation(stats=stats, model=model_facts(folder), data={**about, "file": path.name})
    return {"layers": model.num_layers, "moe_layers": list(folder.counts), "data": about}, observation


def _seen(observation: Observation) -> dict[str, Any]:
    never = {
        str(layer): [expert for expert, count in enumerate(loads) if not count]
        for layer, loads in observation.stats.loads().items()
    }
    return {
        "stats_digest": observation.stats.digest(),
        "sums": ["token_count", *observation.stats.sums],
        "never_routed": {layer: experts for layer, experts in never.items() if experts},
    }
