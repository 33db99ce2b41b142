"""`secateur inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.model_options import ExpertsFrom
from secateur.commands.shown import show
from secateur.files.bytes_in_words import in_words


def inspect(
    model: Annotated[Path, typer.Argument(help="The folder of a Hugging Face model.")],
    experts_from: ExpertsFrom = "config",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a model holds and what can be pruned: family, experts, routers, bytes. Only headers are read.

    Example: `secateur inspect models/Qwen3-30B-A3B`
    """
    from secateur.model_folder.read.inspect import inspect as function

    result = function(model, experts_from=experts_from)  # type: ignore[arg-type]  # others are refused by name
    show(result, _summary(result.to_json()), as_json=as_json, quiet=False)


def _summary(found: dict[str, Any]) -> str:
    size, total = found["bytes"], sum(found["bytes"].values())
    counts = list(found["experts"].values())
    experts = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    groups = f", {found['groups']} router groups" if found["groups"] > 1 else ""
    shared = f", {found['shared_experts']} shared" if found["shared_experts"] else ""
    attention = f"; {found['attention_experts']} attention experts each" if found["attention_experts"] else ""
    lines = [
        f"{found['path']}: {found['model_type']} ({found['class']})",
        f"{len(counts)} of {found['decoder_layers']} layers have experts, {experts} each, top-k {found['top_k']}"
        f"{groups}{shared}{attention}",
        f"{in_words(total)} in {found['files']} files: "
        + ", ".join(f"{part} {in_words(size[part])} ({100 * size[part] / total:.1f} %)" for part in size),
        f"dtypes {', '.join(found['dtypes'])}; quantised: {found['quantisation'] or 'no'}; names {found['names']}",
    ]
    if found["read_as"]:
        lines.insert(1, found["read_as"])
    if found["zero_slots"]:
        zero = sum(found["zero_slots"].values())
        lines.append(f"{zero} zero slots in {len(found['zero_slots'])} layers, of experts that were removed")
    if found["mtp_experts"]:
        lines.append(f"layers that predict further tokens: {', '.join(found['mtp_experts'])}")
    return "\n".join([*lines, *(f"- {limit}" for limit in found["limits"])])
