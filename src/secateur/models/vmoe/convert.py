"""A model folder made of a published V-MoE or E3 checkpoint."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.files.atomic import atomic_write
from secateur.files.given import StrPath, check_given
from secateur.files.new_folder import IS_THERE, check_free, compared_beside, is_occupied, written_beside
from secateur.files.progress import OnStage, no_loading_bars
from secateur.files.refused import refused_by_the_disk
from secateur.files.seen import Seen
from secateur.models.vmoe.flax_checkpoint import read_vmoe
from secateur.models.vmoe.pixels import FILE, default_pixels
from secateur.results import Written

FORMAT, VERSION = "secateur-convert-vmoe", 1
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Converted(Written):
    """What `convert_vmoe` wrote.

    Args:
        out: the folder. num_parameters: of the model. moe_layers: its blocks with experts, of num_layers in all.
        num_experts: of each of them. members: of the ensemble; 1 of a V-MoE.
    """

    num_parameters: int
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    members: int


def convert_vmoe(
    prefix: StrPath,
    out: StrPath,
    *,
    top_k: int,
    members: int | None = None,
    capacity_factor: float = 1.05,
    group_images: int = 8,
    on_progress: OnStage | None = None,
) -> Converted:
    """Make a model folder of a V-MoE or E3 checkpoint that its authors published (flax, msgpack).

    The folder is one of a transformers model. Pixels are made as the authors do, from -1 to 1
    (preprocessor_config.json).

    Args:
        prefix: path of the checkpoint's files, without .index and .data-*.
        out: a new folder for the model.
        top_k: experts of a token: 2 in the published V-MoE, 1 in E3.
        members: of an E3 whose routers do not tell, such as a pre-trained one; what they say without it.
        capacity_factor: places of an expert, relative to an even load.
        group_images: images that are routed together.
        on_progress: never called, as no part of the work is known to be half of it; every function takes it.

    Returns:
        The folder, and the sizes of the model. Where the folder is there already, byte for byte as it would be
        written, it is left as it is, and "is_there" is in `to_json()`.

    Raises:
        SecateurError: `out` is not free, the files are damaged, or hold another model.
        OSError: the disk refused; nothing is left under the name of `out`.

    Example:
        >>> secateur.convert_vmoe("vmoe_b16_imagenet21k_randaug_strong", "vmoe-b16", top_k=2).num_experts
        8
    """
    check_given(convert_vmoe, locals())
    prefix, out = Path(prefix), Path(out)
    may_be_there = is_occupied(out) and all((out / name).is_file() for name in (CONFIG, FILE))
    if not may_be_there:
        check_free(out)
    prefix = prefix.with_name(prefix.name.removesuffix(".index"))
    seen = Seen.of(path for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.*")) if path.is_file())
    model = read_vmoe(
        prefix,
        num_experts_per_tok=top_k,
        members=members,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        group_images=group_images,
    )
    config: Any = model.config
    with (compared_beside if may_be_there else written_beside)(out) as beside:
        with refused_by_the_disk(beside), no_loading_bars():
            model.save_pretrained(beside)
        atomic_write(beside / FILE, json.dumps(default_pixels(config), indent=2) + "\n")
        seen.check()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Converted(
        out=out,
        num_parameters=num_parameters,
        num_layers=config.num_hidden_layers,
        moe_layers=tuple(config.moe_layers),
        num_experts=config.num_experts,
        members=config.ensemble_size,
        content={
            "format": FORMAT,
            "version": VERSION,
            "out": str(out),
            "parameters": num_parameters,
            "layers": config.num_hidden_layers,
            "moe_layers": list(config.moe_layers),
            "experts": config.num_experts,
            "members": config.ensemble_size,
            **({IS_THERE: True} if may_be_there else {}),
        },
    )
