"""Of which form are the tensors of the result: those of a stock architecture, or those of a BAM?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.model_folder.read.tensor_files import StoredTensor
from secateur.model_folder.rewrite.pieces import NewTensor
from secateur.upcycling import bam, recipe
from secateur.upcycling.forms import Blueprint
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents, check_target_takes
from secateur.upcycling.recipe import ROUTERS, Division
from secateur.upcycling.targets import BAM

Routers = Mapping[str, StoredTensor]  # in the file ROUTERS of the work folder


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A row of the table.

    tensors: all of them, from what they are made. routers: those of a layer, {name: what it sees: "ffn" or "attention",
    the input of these; "gate", nothing, as it is zero}. config: config.json. check: refuses what has no place.
    """

    tensors: Callable[[Parents, Blueprint, Asked, Division, Routers], list[NewTensor]]
    routers: Callable[[Blueprint, int], dict[str, str]]
    config: Callable[[Parents, Blueprint], dict[str, Any]]
    check: Callable[[Parents, Blueprint], None]


STOCK = Layout(
    tensors=recipe.new_tensors,
    routers=recipe.router_names,
    config=recipe.new_config,
    check=lambda parents, plan: check_target_takes(parents, plan.target),
)
OF_BAM = Layout(
    tensors=lambda parents, plan, asked, division, routers: bam.bam_tensors(parents, plan, routers, ROUTERS),
    routers=bam.router_names,
    config=bam.bam_config,
    check=lambda parents, plan: bam.check_bam_takes(parents),
)


def layout_of(plan: Blueprint) -> Layout:
    return OF_BAM if plan.target is BAM else STOCK
