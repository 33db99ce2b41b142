"""`secateur observe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands import data_options
from secateur.commands.data_options import DataOptions, device_named
from secateur.commands.data_pass import prepare
from secateur.commands.new_file import check_new_file
from secateur.commands.taken import taken_from
from secateur.errors import SecateurError
from secateur.files.bytes_in_words import in_words

if TYPE_CHECKING:
    from secateur.model_folder.read.model_folder import ModelFolder
    from secateur.observation.observation import Observation


def observe(
    model: Annotated[Path, typer.Argument(help="The folder of a Hugging Face model; it is only read.")],
    out: Annotated[Path, typer.Option("--out", help="The statistics file to write, such as stats.safetensors.")],
    data: data_options.Data = None,
    samples: data_options.Samples = None,
    sequence_length: data_options.SequenceLength = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the sequences, or the images and their order.")] = 0,
    batch_size: data_options.BatchSize = None,
    pack: data_options.Pack = None,
    text_key: data_options.TextKey = None,
    split: data_options.Split = None,
    activations: data_options.Activations = None,
    device: data_options.Device = "auto",
    sums: Annotated[
        list[str] | None,
        typer.Option("--sums", help="Record a further sum, such as output_sum. Repeatable; see docs/observe.md."),
    ] = None,
    sglang: Annotated[
        Path | None,
        typer.Option("--sglang", help="Run nothing; take the counts that SGLang recorded in this .pt file."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over --out if it is there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted run left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what it takes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Run a model on text, or a V-MoE on images, and record what its experts do, for all criteria at once.

    Without `--data` the text is Python's own standard library and its reference.
    One decoder layer at a time is in memory, so the model may be larger than that. A run that was killed goes on at
    the layer it had reached when it is started again with the same arguments. Layers that predict further tokens
    (multi-token prediction) are not run.

    Example: `secateur observe models/Qwen3-30B-A3B --data code=src --data chats.jsonl --out stats.safetensors`
    """
    from secateur.model_folder.read.model_folder import read_model_folder

    check_new_file(out, force, *(source for source in (model, sglang) if source is not None))
    if sglang is not None and data:
        raise SecateurError("--sglang and --data: a recording needs no text")
    if sglang is not None and sums:
        raise SecateurError("--sglang and --sums: a recording holds counts only")
    folder = read_model_folder(model)
    if sglang is not None:
        result = _recorded(folder, sglang, out, dry_run)
    else:
        asked = taken_from(locals(), DataOptions)
        show = not (quiet or as_json or dry_run)
        ready = prepare(folder, asked, out, device=device_named(device), show=show, restart=restart, sums=sums or ())
        result = ready.about | ({} if dry_run else _seen(ready.take()))
    result = {"format": "secateur-observe", "version": 1, "model": str(model), "out": str(out), **result}
    if as_json:
        print(json.dumps(result | {"dry_run": dry_run}, indent=2))
    elif not quiet:
        print(_summary(result, dry_run))


def _recorded(folder: ModelFolder, path: Path, out: Path, dry_run: bool) -> dict[str, Any]:
    from secateur.model_folder.read.facts import model_facts
    from secateur.observation.observation import Observation
    from secateur.observation.sglang import read_recording, stats_of_recording

    recorded, about = read_recording(path)
    model = folder.config
    stats = stats_of_recording(recorded, folder.counts, num_layers=model.num_layers, top_k=model.top_k)
    observation = Observation(stats=stats, model=model_facts(folder), data={**about, "file": path.name})
    if not dry_run:
        observation.save(out)
    return {"layers": model.num_layers, "moe_layers": list(folder.counts), "data": about, **_seen(observation)}


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


def _summary(result: dict[str, Any], dry_run: bool) -> str:
    data = result["data"]
    lines = [
        f"{'would write' if dry_run else 'wrote'} {result['out']}: {len(result['moe_layers'])} MoE layers of "
        f"{result['layers']} layers"
    ]
    if "images" in data:
        lines.append(f"{data['images']:,} images of {data['of']:,}, {data['batch_size']} at a time")
    if "tokens" in data:
        shares = ", ".join(f"{name} {domain['sequences']}" for name, domain in data["domains"].items())
        lines.append(f"{data['tokens']:,} tokens; sequences: {shares}")
        lines.append(
            f"{in_words(result['bytes_to_read'])} read, one layer at a time; about "
            f"{in_words(result['peak_memory_bytes_estimated'])} of memory and what one batch needs; "
            f"{in_words(result['activation_bytes'])} of activations "
            f"{'in memory' if result['activations'] == 'memory' else 'on the disk, twice that for a while'}"
        )
    if result.get("sums_bytes"):
        lines.append(f"{in_words(result['sums_bytes'])} of sums on request, in memory and in the file")
    if result.get("goes_on"):
        lines.append(f"{'would go' if dry_run else 'went'} on with an interrupted run")
    if result.get("mtp_layers_not_run"):
        listed = ", ".join(map(str, result["mtp_layers_not_run"]))
        lines.append(f"not run: layers that predict further tokens ({listed})")
    if never := result.get("never_routed"):
        count = sum(map(len, never.values()))
        lines.append(f"{count} experts in {len(never)} layers got no token: more data tell more about them")
    return "\n".join(lines)
