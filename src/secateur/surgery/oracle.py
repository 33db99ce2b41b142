"""The barred-experts oracle: what the unpruned model computes when its routers may not choose the dropped experts.

A router is barred by letting it see the rows of the kept experts only and mapping what it chooses back to the old ids;
the experts themselves stay whole. So the pruned model must give the same logits bit for bit when the kept order is
ascending. (Setting the dropped logits to -inf instead is the same function, but its matrix products and sums have
other shapes, and so other roundings: about 1e-7.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.expert_axis import ExpertTensor, row_index
from secateur.families import MoEBlock, MoEModel, module_at, plain_class
from secateur.modeling_secateur import layer_of
from secateur.observation.call import read_call
from secateur.plans import LayerPlan, Plan
from secateur.surgery.module import check_plan, router_tensors


@contextlib.contextmanager
def barred_experts(moe: MoEModel, plan: Plan) -> Iterator[None]:
    """While it lasts, the routers of `moe.model` cannot choose an expert that `plan` drops; after, nothing has changed.

    Raises:
        SecateurError: the plan does not fit the model.
    """
    check_plan(moe, plan)
    undo: list[Callable[[], Any]] = []
    try:
        for layer, layer_plan in plan.layers.items():
            block = moe.blocks[layer]
            for spec in router_tensors(block):
                undo += _bar(moe.model, block, spec, layer_plan)
            for (name, key), value in moe.layout.attributes.items():
                if layer_of(name) == layer and not f"{name}.".startswith(f"{block.name}.experts."):
                    module = module_at(moe.model, name)
                    undo.append(functools.partial(setattr, module, key, getattr(module, key)))
                    setattr(module, key, value.size(layer_plan.experts_after))
            hook = block.experts.register_forward_pre_hook(
                _old_ids(block, layer_plan.order), with_kwargs=True, prepend=True
            )
            undo.append(hook.remove)
        yield
    finally:
        for step in reversed(undo):
            step()


def _bar(model: nn.Module, block: MoEBlock, spec: ExpertTensor, layer_plan: LayerPlan) -> list[Callable[[], Any]]:
    """Swap the rows of one router tensor while the block runs: FSDP2 has it whole on the module then, and only then."""
    path, _, key = spec.name.rpartition(".")
    owner = module_at(model, path)
    store: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    whole: list[Tensor] = []

    def bar(module: nn.Module, args: Any) -> None:
        index = row_index(layer_plan, spec, device=store[key].device)
        rows = store[key].detach().index_select(spec.axis.dim, index)
        whole.append(store[key])
        store[key] = nn.Parameter(rows, requires_grad=False) if key in owner._parameters else rows

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        if whole:
            store[key] = whole.pop()

    runs = _gathered_in(model, block, path)
    before = runs.register_forward_pre_hook(bar)
    after = runs.register_forward_hook(restore, prepend=True, always_call=True)  # before FSDP2 takes the whole away
    return [before.remove, after.remove]


def _gathered_in(model: nn.Module, block: MoEBlock, path: str) -> nn.Module:
    """The module in whose forward a parameter of module `path` is whole: the innermost FSDP2 unit, else the block."""
    parts = path.split(".")
    for length in range(len(parts), block.name.count(".") + 1, -1):
        module = module_at(model, ".".join(parts[:length]))
        if plain_class(module) is not type(module):
            return module
    return block.block


def _old_ids(block: MoEBlock, order: tuple[int, ...]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = read_call(f"{block.name}.experts", args, kwargs)
        old = torch.tensor(order, dtype=call.index.dtype, device=call.index.device)
        return call.with_index(old[call.index.to(torch.int64)])

    return hook
