"""`secateur convert-vmoe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.shown import show
from secateur.files.new_folder import IS_THERE


def convert_vmoe(
    prefix: Annotated[Path, typer.Argument(help="Path of the checkpoint's files, without .index and .data-*.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the model.")],
    top_k: Annotated[int, typer.Option("--top-k", help="Experts a token: 2 in the published V-MoE, 1 in E3.")],
    members: Annotated[
        int | None,
        typer.Option(
            "--members",
            min=1,
            help="Members of an E3 whose routers do not tell, such as a pre-trained one. Default: what they say.",
        ),
    ] = None,
    capacity_factor: Annotated[
        float, typer.Option("--capacity-factor", help="Places of an expert, relative to an even load.")
    ] = 1.05,
    group_images: Annotated[int, typer.Option("--group-images", help="Images that are routed together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make a model folder of a V-MoE or E3 checkpoint that its authors published (flax, msgpack).

    The folder is one of a transformers model: `inspect`, `observe`, `prune`, `eval` and all others take it.
    Pixels are made as the authors do, from -1 to 1 (preprocessor_config.json).

    Example: `secateur convert-vmoe vmoe_b16_imagenet21k_randaug_strong --top-k 2 --out vmoe-b16`
    """
    from secateur.models.vmoe.convert import convert_vmoe as function

    result = function(
        prefix, out, top_k=top_k, members=members, capacity_factor=capacity_factor, group_images=group_images
    )
    words = (
        f"{out}: {result.num_parameters / 1e6:.1f} M parameters, {result.num_experts} experts in "
        f"{len(result.moe_layers)} of {result.num_layers} blocks"
    )
    words += f", {result.members} members" if result.members > 1 else ""
    words += "; it was there already, as this command writes it" if IS_THERE in result.to_json() else ""
    show(result, words, as_json=as_json, quiet=quiet)
