"""Apply a plan to a model whose parameters are sharded by transformers' distributed layer or by FSDP2, in place.

Layer by layer, and tensor by tensor inside a layer, so no rank ever holds more than one layer's experts beyond its own
shard. Rows move straight from the rank that has them to the ranks that will. All ranks must call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe
from secateur.modeling_secateur import replace_tensor_
from secateur.plan import LayerPlan, Plan
from secateur.surgery.module import check_plan, locate, set_counts_
from secateur.surgery.optimizer import Replacement, replace_parameters_
from secateur.surgery.tensors import ExpertTensor, gather, row_index
from secateur.train.distributed.fsdp import (
    as_dtensor,
    gathered_dims,
    managed_entry,
    model_parallel_value,
    replace_managed_,
    reshard_,
)
from secateur.train.distributed.rows import fetch_rows, layout_of

DISPATCH = "ep_dispatch_experts"  # transformers' name of the style that sends tokens to the experts' ranks


def prune_sharded_model_(moe: MoEModel, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> MoEModel:
    """`prune_model_` for sharded parameters; the model object, its FSDP groups and the optimizer object stay.

    Call it on every rank after `optimizer.step()`: gradients of the replaced parameters are dropped.

    Returns:
        The description of the pruned model.

    Raises:
        SecateurError: the plan does not fit the model or its expert-parallel size, found before anything is changed.
            An error later (out of memory, a lost rank) leaves the model unusable: go back to the last checkpoint.
    """
    check_plan(moe, plan)
    ep_size = expert_parallel_size(moe.model)
    for layer, one in plan.layers.items():
        if one.experts_after % ep_size:
            raise SecateurError(
                f"plan: layer {layer} keeps {one.experts_after} experts, expected a multiple of the expert-parallel "
                f"size {ep_size}"
            )
    reshard_(moe.model)
    for layer, one in plan.layers.items():
        if one.order != tuple(range(one.experts_before)):
            replacements = [_replace_(moe.model, spec, one) for spec in moe.blocks[layer].tensors]
            if optimizer is not None:
                replace_parameters_(optimizer, [one for one in replacements if one is not None])
    counts = moe.counts | {layer: one.experts_after for layer, one in plan.layers.items()}
    set_counts_(moe, counts)
    if ep_size > 1:
        for layer in plan.layers:
            _install_dispatch_(moe.model, moe.blocks[layer].experts)
    return describe_moe(moe.model, moe.layout)


def expert_parallel_size(model: nn.Module) -> int:
    """Ranks that share the experts of a layer."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    return 1 if config is None else int(config.ep_size)


def _replace_(model: nn.Module, spec: ExpertTensor, one: LayerPlan) -> Replacement | None:
    """Put the kept rows of one tensor in its place; what the optimizer has to follow, None for a buffer."""
    owner, key = locate(model, spec)
    old: Any = getattr(owner, key)
    if not isinstance(old, DTensor):
        value = gather(old, spec, one.order, one.experts_before)
        if not isinstance(old, nn.Parameter):
            replace_tensor_(owner, key, value)
            return None
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        replace_tensor_(owner, key, new)
        return Replacement(old=old, new=new, spec=spec, order=one.order, num_experts=one.experts_before)
    new = _sharded_parameter_(model, owner, key, old, spec, one)
    parameter: Any = old

    def follow(state: Any, spec: ExpertTensor) -> Tensor:
        return _like(new, state, spec, one)

    return Replacement(
        old=parameter, new=new, spec=spec, order=one.order, num_experts=one.experts_before, gather_state=follow
    )


def _sharded_parameter_(
    model: nn.Module, owner: nn.Module, key: str, old: DTensor, spec: ExpertTensor, one: LayerPlan
) -> Any:
    managed = managed_entry(model, owner, key)
    if managed is None:
        value = _like(old, old, spec, one)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        replace_tensor_(owner, key, new)
        return new
    group, position = managed
    entry = group.fsdp_params[position]
    local = _part(old, spec, one, without=gathered_dims(old, entry))
    new = replace_managed_(group, position, model_parallel_value(entry, local, _shape(old, spec, one)))
    new.__dict__.update({name: value for name, value in vars(old).items() if name not in vars(new)})
    return new


def _like(new: DTensor, old: DTensor, spec: ExpertTensor, one: LayerPlan) -> DTensor:
    """The kept rows of `old`, sharded over the same ranks."""
    if (old.device_mesh, old.placements) != (new.device_mesh, new.placements):
        raise SecateurError(
            f"{spec.name}: sharded as {old.placements} on {old.device_mesh}, expected {new.placements} on "
            f"{new.device_mesh} like its parameter"
        )
    return as_dtensor(_part(old, spec, one), old.device_mesh, old.placements, _shape(old, spec, one))


def _shape(old: DTensor, spec: ExpertTensor, one: LayerPlan) -> torch.Size:
    """Of the whole new tensor."""
    shape = list(old.shape)
    shape[spec.dim] = spec.axis_size(one.experts_after)
    return torch.Size(shape)


def _part(old: DTensor, spec: ExpertTensor, one: LayerPlan, *, without: tuple[int, ...] = ()) -> Tensor:
    """This rank's part of the new tensor, mesh dimensions `without` not cutting it."""
    layout = layout_of(old, spec.name)
    if spec.dim == 0:
        kept = row_index(one.order, one.experts_before, spec).tolist()
        return fetch_rows(
            old, layout, [kept[rows.start : rows.stop] for rows in layout.ranges(len(kept), without=without)]
        )
    # the experts of a small router tensor lie across its rows: gather them here, then exchange rows as they are
    local = gather(old.to_local(), spec, one.order, one.experts_before)
    across = as_dtensor(local, old.device_mesh, old.placements, _shape(old, spec, one))
    return fetch_rows(across, layout, layout.ranges(old.shape[0], without=without))


def _install_dispatch_(model: Any, experts: nn.Module) -> None:
    """Make transformers' dispatch anew: the installed one holds the expert count of before."""
    if "forward" not in vars(experts):
        return
    del experts.forward  # the class's own forward is what the new dispatch must wrap
    meshes, config = model._mesh_manager, model.config.distributed_config
    ALL_PARALLEL_STYLES[DISPATCH].install_forward(
        experts,
        ep_mesh=meshes.get_mesh("ep"),
        tp_mesh=meshes.get_mesh("tp"),
        ep_implementation=config.ep_implementation,
    )
