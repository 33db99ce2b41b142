"""`secateur convert-vmoe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


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
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make a model folder of a V-MoE or E3 checkpoint that its authors published (flax, msgpack).

    The folder is one of a transformers model: `inspect`, `observe`, `prune`, `eval` and all others take it.
    Pixels are made as the authors do, from -1 to 1 (preprocessor_config.json).

    Example: `secateur convert-vmoe vmoe_b16_imagenet21k_randaug_strong --top-k 2 --out vmoe-b16`
    """
    from secateur.errors import SecateurError
    from secateur.files.atomic import atomic_write, refused_by_the_disk
    from secateur.files.new_folder import written_beside
    from secateur.models.vmoe.flax_checkpoint import read_vmoe
    from secateur.models.vmoe.pixels import FILE, default_pixels

    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise SecateurError(f"--out {out}: it is there already and not an empty folder")
    model: Any = read_vmoe(
        prefix.with_name(prefix.name.removesuffix(".index")),
        num_experts_per_tok=top_k,
        members=members,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        group_images=group_images,
    )
    with written_beside(out) as beside:
        with refused_by_the_disk(beside):
            model.save_pretrained(beside)
        atomic_write(beside / FILE, json.dumps(default_pixels(model.config), indent=2) + "\n")
    if not quiet:
        config = model.config
        print(
            f"{out}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, "
            f"{config.num_experts} experts in {len(config.moe_layers)} of {config.num_hidden_layers} blocks"
            + (f", {config.ensemble_size} members" if config.ensemble_size > 1 else "")
        )
