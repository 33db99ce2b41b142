"""Apply a plan to a model whose parameters are sharded by transformers' distributed layer or by FSDP2, in place.

Layer by layer, and tensor by tensor inside a layer. Rows move straight from the rank that has them to the rank that
will, so a rank never holds more of a tensor than its old part, its new part and what is in flight between the two. All
ranks must call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor, gather, row_index
from secateur.families import MoEModel, describe_moe, tensor_at
from secateur.modeling_secateur import replace_tensor_
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import check_plan, locate, set_counts_
from secateur.surgery.optimizer import Optimizers, Replacement, check_optimizer, each_of, replace_parameters_
from secateur.train.distributed.fsdp import managed_entry, replace_managed_, reshard_
from secateur.train.distributed.rows import layout_of, take_rows

DISPATCH = "ep_dispatch_experts"  # transformers' name of the style that sends tokens to the experts' ranks


def prune_sharded_model_(moe: MoEModel, plan: Plan, optimizer: Optimizers | None = None) -> MoEModel:
    """`prune_model_` for sharded parameters, which are new objects; model, FSDP groups and optimizers stay.

    Call it on every rank after `optimizer.step()`: gradients of the replaced parameters are dropped.

    Returns:
        The description of the pruned model.

    Raises:
        SecateurError: the plan does not fit the model or its expert-parallel size, or a tensor or its optimizer state
            is split in a way that cannot be followed; found before anything is changed. An error later (out of memory,
            a lost rank) leaves the model unusable: go back to the last checkpoint.
    """
    check_plan(moe, plan)
    ep_size = expert_parallel_size(moe.model)
    plan = plan.filled(moe.counts)
    changed = {layer: layer_plan for layer, layer_plan in plan.layers.items() if not layer_plan.is_identity}
    for layer, layer_plan in changed.items():
        if layer_plan.experts_after % ep_size:
            raise SecateurError(
                f"plan: layer {layer} keeps {layer_plan.experts_after} experts, expected a multiple of the "
                f"expert-parallel size {ep_size}"
            )
    reshard_(moe.model)
    optimizers = () if optimizer is None else each_of(optimizer)
    for one in optimizers:
        check_optimizer(one)
    for layer in changed:
        for spec in moe.blocks[layer].tensors:
            _check_split(moe.model, spec, [one.state for one in optimizers])
    for layer, layer_plan in changed.items():
        replacements = [_replace_(moe.model, spec, layer_plan) for spec in moe.blocks[layer].tensors]
        replace_parameters_(optimizers, [replacement for replacement in replacements if replacement is not None])
    set_counts_(moe, {layer: layer_plan.experts_after for layer, layer_plan in plan.layers.items()})
    if ep_size > 1:
        for layer in changed:
            _install_dispatch_(moe.model, moe.blocks[layer].experts)
    return describe_moe(moe.model, moe.layout)


def expert_parallel_size(model: nn.Module) -> int:
    """Ranks that share the experts of a layer."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    return 1 if config is None else int(config.ep_size)


def check_expert_parallel(moe: MoEModel) -> None:
    """See by the modules and shapes on this rank that expert parallelism is there, since a plan that matches nothing is
    silent.

    Raises:
        SecateurError: names the module or tensor.
    """
    ep_size = expert_parallel_size(moe.model)
    for block in moe.blocks.values() if ep_size > 1 else ():
        if "forward" not in vars(block.experts):
            raise SecateurError(
                f"{block.name}.experts: the model's expert-parallel size is {ep_size}, but nothing sends its tokens to "
                f"other ranks: expected an ep_plan with the style {DISPATCH!r} for it"
            )
        for spec in block.tensors:
            tensor: Any = tensor_at(moe.model, spec.name)
            if not spec.name.startswith(f"{block.name}.experts."):
                continue
            rows = tensor.to_local().shape[0] if isinstance(tensor, DTensor) else tensor.shape[0]
            if rows * ep_size > tensor.shape[0]:
                raise SecateurError(
                    f"{spec.name} of shape {tuple(tensor.shape)}: this rank holds {rows} rows, so it is not split over "
                    f"expert-parallel size {ep_size}"
                )


def _check_split(model: nn.Module, spec: ExpertTensor, states: Sequence[Mapping[Any, Any]]) -> None:
    """Raise unless the parts of one tensor and of its optimizer state can follow the experts."""
    owner, key = locate(model, spec.name)
    tensor: Any = getattr(owner, key)
    if not isinstance(tensor, DTensor):
        return
    layout_of(tensor, spec.name)
    dim = spec.axis.dim
    if dim != 0 and any(placement.is_shard(dim) for placement in tensor.placements):
        raise SecateurError(f"{spec.name}: placements {tensor.placements} cut its expert axis {dim}, expected 0")
    for name, value in [item for state in states for item in state.get(tensor, {}).items()]:
        if isinstance(value, DTensor) and (value.device_mesh, value.placements) != (
            tensor.device_mesh,
            tensor.placements,
        ):
            raise SecateurError(
                f"{spec.name}: optimizer state {name} is sharded as {value.placements} on {value.device_mesh}, expected"
                f" {tensor.placements} on {tensor.device_mesh} like its parameter"
            )


def _replace_(model: nn.Module, spec: ExpertTensor, layer_plan: LayerPlan) -> Replacement | None:
    """Put the kept experts of one tensor in its place; what the optimizer has to follow, None for a buffer."""
    owner, key = locate(model, spec.name)
    old: Any = getattr(owner, key)
    new: Any
    managed = managed_entry(model, owner, key)
    if managed is not None:
        new = replace_managed_(*managed, _part(old, spec, layer_plan), _shape(old, spec, layer_plan))
    else:
        value = _kept(old, spec, layer_plan)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        replace_tensor_(owner, key, new)
    if not isinstance(old, nn.Parameter):
        return None
    new.__dict__.update({name: value for name, value in vars(old).items() if name not in vars(new)})
    return Replacement(
        old=old,
        new=new,
        spec=spec,
        layer_plan=layer_plan,
        gather_state=lambda state, spec: _kept(state, spec, layer_plan),
    )


def _kept(old: Tensor, spec: ExpertTensor, layer_plan: LayerPlan) -> Tensor:
    """The kept experts of a tensor, sharded like it if it is sharded."""
    if not isinstance(old, DTensor):
        return gather(old, spec, layer_plan)
    shape = _shape(old, spec, layer_plan)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        _part(old, spec, layer_plan), old.device_mesh, old.placements, run_check=False, shape=shape, stride=stride
    )


def _part(old: DTensor, spec: ExpertTensor, layer_plan: LayerPlan) -> Tensor:
    """This rank's part of them."""
    if spec.axis.dim == 0:
        return take_rows(old, spec.name, row_index(layer_plan, spec))
    return gather(old.to_local(), spec, layer_plan)  # its rows hold all experts and stay


def _shape(old: DTensor, spec: ExpertTensor, layer_plan: LayerPlan) -> torch.Size:
    """Of the whole new tensor."""
    return torch.Size(spec.axis.resized(old.shape, layer_plan.experts_after))


def _install_dispatch_(model: Any, experts: nn.Module) -> None:
    """Make transformers' dispatch anew: the installed one holds the expert count of before."""
    del experts.forward  # the class's own forward is what the new dispatch must wrap
    meshes, config = model._mesh_manager, model.config.distributed_config
    ALL_PARALLEL_STYLES[DISPATCH].install_forward(
        experts,
        ep_mesh=meshes.get_mesh("ep"),
        tp_mesh=meshes.get_mesh("tp"),
        ep_implementation=config.ep_implementation,
    )
