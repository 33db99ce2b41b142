"""Keep DistributedDataParallel synchronising a model whose parameters were replaced.

DDP hooks its gradient reduction to the parameters it was built with, and cuts its buckets by their sizes. Gradients of
a pruned one do not fit: the next step stops with torch's internal error. So after surgery the reducer is built anew
inside the same DDP object, which the training loop holds; all its settings stay.

In a training loop of all ranks:

    finder = DDPFinder(model)       # before training; the model itself or its DDP
    ...
    ddp = finder.ready()            # after optimizer.step(), before surgery
    prune_model_(moe, plan, optimizer)
    if ddp is not None:
        rebuild_ddp_(ddp)

Gradients. Those of replaced parameters are dropped by surgery, so what was accumulated under `no_sync` and not yet
reduced would be lost in part: `ready` refuses then. Gradients that `optimizer.step()` has used may stay; surviving
parameters go on accumulating into theirs until they are zeroed, as without surgery.
"""

from __future__ import annotations

import hashlib
import json
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.errors import SecateurError
from secateur.observation.hooks import OfOneModel

# what the rebuild takes from DDP's insides, the same in torch 2.8 to 2.13
_INTERNALS = (
    "_build_params_for_reducer",
    "_build_debug_param_to_name_mapping",
    "_ddp_init_helper",
    "_check_reducer_finalized",
    "_get_ddp_logging_data",
    "_delay_all_reduce_params",
    "_join_config",
    "_module_parameters",
    "_use_python_reducer",
    "parameters_to_ignore",
)

# setting -> (whether a DDP has it, why its reducer cannot be built anew)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "delay_all_reduce_named_params": (
        lambda ddp: bool(ddp._delay_all_reduce_params),
        "its gradient buffer has views of the old parameters",
    ),
    "mixed_precision": (
        lambda ddp: ddp.mixed_precision is not None,
        "low-precision copies hang on the old parameters; use autocast",
    ),
    "device_mesh": (
        lambda ddp: getattr(ddp, "device_mesh", None) is not None,
        "with tensor parallelism DDP rewrites the modules; for data parallelism alone pass process_group",
    ),
    "torch._dynamo.config.optimize_ddp = 'python_reducer'": (
        lambda ddp: ddp._use_python_reducer,
        "its hooks hang on the old parameters",
    ),
    "torch.compile": (
        lambda ddp: ddp._compiled_call_impl is not None,
        "compiled code holds the old parameters",
    ),
    "join()": (
        lambda ddp: ddp._join_config.enable,
        "a rank that has run out of batches takes no part in a pruning",
    ),
    "a built-in communication hook": (
        lambda ddp: not ddp._comm_hooks and bool(ddp._get_ddp_logging_data().get("comm_hook")),
        "DDP does not say which; use register_comm_hook",
    ),
}


def check_ddp(ddp: DistributedDataParallel) -> None:
    """Refuse a DDP object that could not be rebuilt after surgery, before any time is spent on training.

    Communication hooks are taken over if they keep nothing between steps: plain functions, whose state is None or a
    process group. Others, PowerSGD's say, keep tensors by the buckets of the old parameters.

    Raises:
        SecateurError: names the setting or hook.
    """
    missing = [name for name in _INTERNALS if not hasattr(ddp, name)]
    if missing:
        raise SecateurError(
            f"DistributedDataParallel of torch {torch.__version__} has no {missing[0]}: it cannot be rebuilt after a "
            "pruning, which is written for torch 2.8 to 2.13"
        )
    for name, (found, why) in _REFUSED.items():
        if found(ddp):
            raise SecateurError(f"DistributedDataParallel with {name} cannot be used with expert pruning: {why}")
    for hook, state in ddp._comm_hooks:
        if not _keeps_nothing(hook, state):
            raise SecateurError(
                f"DistributedDataParallel has the communication hook {getattr(hook, '__qualname__', hook)} with a "
                f"{type(state).__name__} as state, which may hold tensors by the shapes of before a pruning: expected "
                "a plain function whose state is None or a process group"
            )


class DDPFinder:
    """Learns which DDP object wraps a model, from a forward pre-hook of the model.

    A wrapped model does not know its wrapper, and transformers' Trainer gives callbacks the model only. While DDP runs
    a forward pass it names itself (`_active_ddp_module`, made for torch.compile), so the first training step tells.
    The wrapper may also hold the model as a part of its module. It is checked by `check_ddp` as soon as it is known.

    Args:
        model: the model, or the DDP object around it, which is then checked at once.

    Attributes:
        model: the model without its wrapper.

    Raises:
        SecateurError: see `check_ddp`; from the first forward pass where only the model was given.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None  # weak, so the model can be deep-copied
        self._unreduced = False
        if isinstance(model, DistributedDataParallel):
            self._found(model)
            model = model.module
        self.model = model
        below: Any = getattr(model, "base_model", model)  # PEFT calls the forward of the model itself as a function
        self._hook = below.register_forward_pre_hook(OfOneModel(self._before_forward))

    @property
    def wrapper(self) -> DistributedDataParallel | None:
        """The wrapper that ran the model last; None while no forward pass has run under one."""
        return None if self._wrapper is None else self._wrapper()

    def ready(self) -> DistributedDataParallel | None:
        """Call on all ranks before surgery, after `optimizer.step()`. Changes nothing.

        Returns:
            The wrapper for `rebuild_ddp_`; None in a job of one process that uses none.

        Raises:
            SecateurError: several processes and no wrapper was seen; gradients that wait for their reduction; a
                backward pass that has not finished it; what `check_ddp` refuses.
        """
        ddp: Any = self.wrapper
        if ddp is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise SecateurError(
                    f"the job has {dist.get_world_size()} processes, but no forward pass of the model ran under "
                    "DistributedDataParallel: expected one wrapper, whose forward is called in training"
                )
            return None
        check_ddp(ddp)  # again: hooks may have been registered since
        waiting = self._unreduced and any(parameter.grad is not None for parameter in ddp.module.parameters())
        if waiting or not ddp.require_backward_grad_sync:
            raise SecateurError(
                "gradients accumulated under no_sync() are not reduced yet and a pruning would lose them: expected to "
                "be called outside of no_sync(), after optimizer.step()"
            )
        try:
            ddp._check_reducer_finalized()
        except RuntimeError as error:
            raise SecateurError(
                f"the last backward pass under DistributedDataParallel is not finished: {error}"
            ) from None
        return self.wrapper

    def detach(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def _before_forward(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None:
            return
        if ddp is not self.wrapper and any(module is self.model for module in ddp.module.modules()):
            self._found(ddp)
        if ddp is self.wrapper and torch.is_grad_enabled():
            self._unreduced = not ddp.require_backward_grad_sync

    def _found(self, ddp: DistributedDataParallel) -> None:
        check_ddp(ddp)
        world, group = dist.get_world_size(), ddp.process_group.size()
        if group != world:
            raise SecateurError(
                f"DistributedDataParallel averages over {group} of the {world} processes of the job, and the others "
                "would be waited for at a pruning for ever: expected a process group of all"
            )
        self._wrapper = weakref.ref(ddp)


def rebuild_ddp_(ddp: DistributedDataParallel) -> None:
    """Let `ddp` synchronise the parameters that `ddp.module` has now. All ranks of its group must call it.

    The object, its settings, forward hooks, ignored parameters and stateless communication hooks stay; reducer,
    gradient buckets and autograd hooks are new. Buckets take their final order in the second step, as after
    construction. Parameters are not broadcast: every rank must have done the same surgery on the same values.

    Args:
        ddp: checked by `check_ddp` or `DDPFinder.ready` before surgery.

    Raises:
        SecateurError: `check_ddp` refuses it, or the ranks have parameters or buffers of other names, shapes or types;
            on every rank. The model must not be trained further then.
    """
    check_ddp(ddp)
    _compare_ranks(ddp)
    inner: Any = ddp
    inner.reducer = inner.logger = None  # takes its autograd hooks off and frees the old buckets before there are new
    inner._module_parameters = [
        parameter for name, parameter in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    ]
    parameters, sparse = inner._build_params_for_reducer()
    names = inner._build_debug_param_to_name_mapping(parameters)
    inner._ddp_init_helper(parameters, sparse, names, inner.static_graph)
    if inner.static_graph:
        inner.static_graph = False  # or the next line takes it for set already
        inner._set_static_graph()
    hooks, inner._comm_hooks = inner._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def _compare_ranks(ddp: DistributedDataParallel) -> None:
    """Raise on all ranks if one has other tensors: a reducer on top of them would hang, or add what does not match."""
    described = [
        (name, list(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for tensors in (ddp.module.named_parameters(), ddp.module.named_buffers())
        for name, tensor in tensors
        if name not in ddp.parameters_to_ignore
    ]
    digest = hashlib.sha256(json.dumps(described).encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:8], "big", signed=True)], device=ddp.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(ddp.process_group))]
    dist.all_gather(found, mine, group=ddp.process_group)
    digests = [int(digest) for digest in found]
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise SecateurError(
            f"after surgery rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} of {len(digests)} have "
            "parameters or buffers of other names, shapes or types than rank 0: expected the same plan on every rank"
        )


def _keeps_nothing(hook: Any, state: object) -> bool:
    """Whether a communication hook has nowhere to keep tensors from one step to the next.

    Wrappers such as `fp16_compress_wrapper(allreduce_hook)` hold the wrapped function in a closure.
    """
    if state is not None and not isinstance(state, dist.ProcessGroup):
        return False
    if not isinstance(hook, types.FunctionType):  # a bound method, partial or callable object
        return False
    return all(_keeps_nothing(cell.cell_contents, None) for cell in hook.__closure__ or ())
