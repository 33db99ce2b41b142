"""Give an FSDP2-managed module another parameter, and keep all that FSDP built around it.

`fully_shard` registers a module's parameters once; a parameter that is set afterwards is put back at the next forward.
So the entry of the parameter in its group is made anew from the new value, by FSDP's own class and with the old entry's
settings: hooks, prefetch lists, streams, gradient divide factors and the root stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from secateur.errors import SecateurError


def refuse_fsdp1(model: nn.Module) -> None:
    """
    Raises:
        SecateurError: a module is wrapped by the first FSDP, whose parameters are views of flat buffers.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise SecateurError(f"{name or 'the model'} is wrapped by FSDP1 (flat parameters); use FSDP2 (fully_shard)")


def reshard_(model: nn.Module) -> None:
    """Put every FSDP group into its sharded state; a forward without backward may leave some gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def managed_entry(model: nn.Module, owner: nn.Module, key: str) -> tuple[Any, int] | None:
    """(group, position) of FSDP's entry for parameter `key` of module `owner`; None when FSDP does not manage it."""
    for group in _groups(model):
        for position, entry in enumerate(group.fsdp_params):
            info = entry._module_info
            if info.module is owner and info.param_name == key:
                if info.shared_modules:
                    raise SecateurError(f"{entry._param_fqn or key} is shared between modules and sharded by FSDP")
                return group, position
    return None


def replace_managed_(group: Any, position: int, value: Tensor) -> nn.Parameter:
    """Put `value` in the place of a managed parameter.

    Args:
        group, position: from `managed_entry`, in the sharded state.
        value: what FSDP gathers for a forward: the whole parameter, or with expert parallelism this rank's experts.

    Returns:
        The new sharded parameter, as it stands on the module.
    """
    old = group.fsdp_params[position]
    parameter = nn.Parameter(value, requires_grad=old.sharded_param.requires_grad)
    placement = old.fsdp_placement
    entry = type(old)(
        parameter,
        old._module_info,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda parameter: placement,
        group.mp_policy,
        group.offload_policy,
    )
    entry._param_fqn = old._param_fqn
    entry.init_dtype_attrs(group.mp_policy)
    old._post_load_hook_handle.remove()
    group.fsdp_params[position] = entry
    new: nn.Parameter = entry.sharded_param
    return new


def align_(model: nn.Module) -> None:
    """Give shards that a forward uses where they lie, ungathered, memory of their own; before the optimizer is made.

    As loaded they may lie anywhere in a mapped file, and matrix products round by the alignment of their operands.
    """
    for group in _groups(model):
        if group.mesh_info.mesh.size() > 1:
            continue
        for position, entry in enumerate(group.fsdp_params):
            local = entry.sharded_param.to_local()
            if local.data_ptr() % 64:
                replace_managed_(
                    group, position, model_parallel_value(entry, local.detach(), entry.sharded_param.shape)
                )


def gathered_dims(tensor: DTensor, entry: Any) -> tuple[int, ...]:
    """The mesh dimensions of a managed parameter that FSDP added; the rest are those of model parallelism."""
    model_dims = 0 if entry._unsharded_dtensor_spec is None else len(entry._unsharded_dtensor_spec.placements)
    return tuple(range(tensor.device_mesh.ndim - model_dims))


def model_parallel_value(entry: Any, local: Tensor, shape: torch.Size) -> Tensor:
    """The value for `replace_managed_` from this rank's part, under expert parallelism as a DTensor of this shape."""
    spec = entry._unsharded_dtensor_spec
    return local if spec is None else as_dtensor(local, spec.mesh, spec.placements, shape)


def as_dtensor(local: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> DTensor:
    """A DTensor of this contiguous global shape from each rank's part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _groups(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:  # torch before 2.12 has one
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group
