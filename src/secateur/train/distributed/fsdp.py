"""Give an FSDP2-managed module another parameter, and keep all that FSDP built around it.

`fully_shard` registers a module's parameters once; a parameter that is set afterwards is put back at the next forward.
So the entry of the parameter in its group is made anew, by FSDP's own class and with the old entry's settings: hooks,
prefetch lists, streams, gradient divide factors and the root stay as they were. Nothing else in FSDP (torch 2.8 to
2.13) holds an entry: collectives take them from the group's list each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.errors import SecateurError

# what the replacement takes from FSDP's insides, the same in torch 2.8 to 2.13
_GROUP = ("fsdp_params", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy")
_ENTRY = (
    "_module_info",
    "_param_fqn",
    "_post_load_hook_handle",
    "_setattr_on_modules",
    "fsdp_placement",
    "init_dtype_attrs",
    "reset_sharded_param",
    "to_sharded_dtensor",
)
_MADE_FROM = (
    "param",
    "module_info",
    "mesh_info",
    "post_forward_mesh_info",
    "device",
    "shard_placement_fn",
    "mp_policy",
    "offload_policy",
)


def check_fsdp(model: nn.Module) -> None:
    """Refuse what `replace_managed_` could not replace, before any time is spent on training.

    Raises:
        SecateurError: FSDP1, insides of FSDP2 that are not those of torch 2.8 to 2.13, or a setting that is named.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise SecateurError(f"{name or 'the model'} is wrapped by FSDP1 (flat parameters); use FSDP2 (fully_shard)")
    for group in _groups(model):
        _check_internals(group, _GROUP)
        if getattr(group.mesh_info, "is_spmd_mesh", False):
            raise SecateurError("fully_shard with dp_mesh_dims (one mesh for all) cannot be pruned: give FSDP its own")
        for entry in group.fsdp_params:
            _check_internals(entry, _ENTRY)
            if tuple(inspect.signature(type(entry)).parameters) != _MADE_FROM:
                raise _unknown(f"FSDPParam{inspect.signature(type(entry))}")
            name, device = entry._module_info.param_name, group.device.type
            local = _current(entry).to_local()
            if type(local.data) is not Tensor:
                raise SecateurError(f"{name} is a {type(local).__name__} inside FSDP2, expected a plain tensor")
            if local.device.type != device:
                raise SecateurError(f"{name} is offloaded to {local.device} by FSDP2, expected it on {device}")


def check_only_fsdp(model: nn.Module) -> None:
    """For a model that transformers did not split: its job is not known but by FSDP2.

    Raises:
        SecateurError: names a parameter that is split by something else, e.g. tensor parallelism by hand; FSDP2 on a
            part of the processes.
    """
    for group in _groups(model):
        size, world = group.mesh_info.mesh.size(), dist.get_world_size()
        if size != world:
            raise SecateurError(
                f"FSDP2 has a mesh of {size} of the {world} processes of the job, and the others would be waited for "
                "at a pruning for ever: expected one of all"
            )
    by_fsdp = {id(_current(entry)) for _, entry in _entries(model) if model_parallel_spec(entry) is None}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in by_fsdp:
            raise SecateurError(
                f"{name} is split as {parameter.placements} on {parameter.device_mesh}: expected FSDP2 alone, or a "
                "model that transformers splits (from_pretrained with distributed_config)"
            )


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
                return group, position
    return None


def replace_managed_(group: Any, position: int, local: Tensor, shape: torch.Size) -> nn.Parameter:
    """Put another value in the place of a managed parameter. No rank talks to another.

    Args:
        group, position: from `managed_entry`, in the sharded state.
        local: this rank's part of the new value, cut as the old one is, in memory of its own. shape: of the whole.

    Returns:
        The new sharded parameter, as it stands on the module.
    """
    old = group.fsdp_params[position]
    placement, before = old.fsdp_placement, _current(old)
    entry = type(old)(
        _without_memory(old, before, shape),
        old._module_info,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda parameter: placement,
        group.mp_policy,
        group.offload_policy,
    )
    new = nn.Parameter(entry.to_sharded_dtensor(local), requires_grad=before.requires_grad)
    entry._setattr_on_modules(new)
    entry.reset_sharded_param()  # as for a model that was sharded on the meta device and then loaded
    entry._param_fqn = old._param_fqn
    entry.init_dtype_attrs(group.mp_policy)
    old._post_load_hook_handle.remove()
    group.fsdp_params[position] = entry
    return new


def align_(model: nn.Module) -> None:
    """Give shards memory of their own where they lie anywhere in a mapped file; before the first forward.

    Matrix products round by the alignment of their operands, and without FSDP2 shards are used where they lie.
    """
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter._local_tensor.data_ptr() % 64:
            parameter._local_tensor = parameter._local_tensor.clone()


def model_parallel_spec(entry: Any) -> Any:
    """How model parallelism had split a managed parameter before FSDP did; None if it had not."""
    return getattr(entry, "_unsharded_dtensor_spec", None) or getattr(entry, "_tp_spec", None)  # before torch 2.12


def _current(entry: Any) -> Any:
    """The sharded parameter of an entry: what loading has set on the module, which FSDP takes at the first forward."""
    return getattr(entry._module_info.module, entry._module_info.param_name)


def _without_memory(entry: Any, parameter: Tensor, shape: torch.Size) -> nn.Parameter:
    """A parameter of this shape as FSDP would be given it, on the meta device."""
    value = torch.empty(shape, dtype=parameter.dtype, device="meta")
    spec = model_parallel_spec(entry)
    if spec is not None:
        value = distribute_tensor(value, spec.mesh, spec.placements, src_data_rank=None)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _check_internals(value: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if not hasattr(value, name):
            raise _unknown(f"{type(value).__name__} without {name}")


def _unknown(found: str) -> SecateurError:
    return SecateurError(
        f"FSDP2 of torch {torch.__version__} is built otherwise ({found}): its parameters cannot be replaced, which is "
        "written for torch 2.8 to 2.13"
    )


def _entries(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for group in _groups(model):
        for entry in group.fsdp_params:
            yield group, entry


def _groups(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one
            _check_internals(state, ("_fsdp_param_group",))
            groups = [state._fsdp_param_group]
        for group in groups:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group
