"""`secateur observe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands import data_options
from secateur.commands.bars import stage_bars
from secateur.commands.model_options import ExpertsFrom
from secateur.commands.shown import show
from secateur.files.bytes_in_words import in_words
from secateur.files.new_folder import IS_THERE


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
    experts_from: ExpertsFrom = "config",
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
    from secateur.model_folder.measure.observe import observe as function

    with stage_bars(show=not (quiet or as_json or dry_run)) as on_progress:
        result = function(
            model,
            out,
            data=data,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            batch_size=batch_size,
            pack=pack,
            text_key=text_key,
            split=split,
            activations=None if activations is None else activations.value,
            device=device,
            sums=sums,
            sglang=sglang,
            experts_from=experts_from,  # type: ignore[arg-type]  # others are refused by name
            force=force,
            restart=restart,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    show(result, _summary(result.to_json(), dry_run), as_json=as_json, quiet=quiet)


def _summary(result: dict[str, Any], dry_run: bool) -> str:
    data = result["data"]
    did = "would write" if dry_run else "wrote"
    first = f"{did} {result['out']}"
    if IS_THERE in result:
        first = f"{result['out']} holds these statistics already; nothing was written"
    lines = [f"{first}: {len(result['moe_layers'])} MoE layers of {result['layers']} layers"]
    if "images" in data:
        lines.append(f"{data['images']:,} images of {data['of']:,}, {data['batch_size']} at a time")
    if "tokens" in data:
        shares = ", ".join(f"{name} {domain['sequences']}" for name, domain in data["domains"].items())
        lines.append(f"{data['tokens']:,} tokens; sequences: {shares}")
        lines.append(
            f"{in_words(result['bytes_to_read'])} read, one layer at a time; about "
            f"{in_words(result['peak_memory_bytes_estimated'])} of memory, {in_words(result['process_memory_bytes'])} "
            "of that for Python, torch and the data, and what one batch needs; "
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
