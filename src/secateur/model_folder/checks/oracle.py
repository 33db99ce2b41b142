"""What a pruned model must compute, by its source: for every model that can be pruned on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.families import describe_moe
from secateur.model_folder.read.load import text_model
from secateur.model_folder.read.model_folder import ModelFolder
from secateur.model_folder.rewrite.pieces import copies_of
from secateur.model_folder.stream.lazy_tensor import Span
from secateur.modeling_secateur import layer_of
from secateur.observation.call import read_call
from secateur.plans import LayerPlan, Plan
from secateur.surgery.oracle import barred_experts

RUNS_EVERY_EXPERT = "llama4_text"  # its experts are not called with what the router chose


@contextmanager
def without_dropped(model: PreTrainedModel, folder: ModelFolder, plan: Plan) -> Iterator[None]:
    """While it lasts, the loaded source computes what the model that `plan`, which lists every layer, makes of it must.

    The two agree bit for bit where the experts keep their order; if not, sums are taken in another one.
    """
    with (silenced if plan.leaves_zero_slots else barred)(model, folder, plan):
        yield


@contextmanager
def silenced(model: PreTrainedModel, folder: ModelFolder, plan: Plan) -> Iterator[None]:
    """While it lasts, the routers choose as ever, and what they send to an expert that `plan` drops is 0.

    The experts run on all else, each token-slot as a token of its own: to set gates to 0 is the same function, but
    activations of other shapes round otherwise.
    """
    with ExitStack() as stack:
        for layer, experts in _experts(text_model(model, folder), folder).items():
            slots = folder.config.kept.get(layer, tuple(range(folder.slots[layer])))
            gone = [slots[old] for old in plan.layers[layer].gone]
            vars(experts)["forward"] = _without(f"layer {layer}: experts", gone, experts.forward)
            stack.callback(vars(experts).pop, "forward")
        yield


def kept_spans(folder: ModelFolder, plan: Plan) -> dict[str, list[Span]]:
    """What to read of the tensors of experts, when no dropped one can be chosen: of each, its name in the files."""
    spans: dict[str, list[Span]] = {}
    for name, place in folder.located.items():
        if place.role != "expert" or not (gone := plan.layers[place.layer].gone):
            continue
        tensor = folder.files.tensors[name]
        if place.spec is None:
            if place.expert in gone:
                spans[name] = []
            continue
        layer_plan = plan.layers[place.layer]
        rows = place.spec.rows(sorted(layer_plan.order), layer_plan.experts_before)
        copies = copies_of(name, tensor, place.spec.axis.dim, rows)
        spans[name] = [(piece.start - tensor.start, piece.length) for piece in copies]
    return spans


def _experts(text: PreTrainedModel, folder: ModelFolder) -> dict[int, nn.Module]:
    """{layer: its `experts` module} of the MoE layers."""
    return {
        layer: module
        for name, module in text.named_modules()
        if name.endswith(".experts") and (layer := layer_of(name)) is not None and layer in folder.counts
    }


def _without(name: str, gone: list[int], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of the `experts` module `name`, for all slots but those that are `gone`."""

    def partial(*args: Any, **kwargs: Any) -> Tensor:
        call = read_call(name, args, kwargs)
        dead = torch.isin(call.index, torch.tensor(gone, dtype=call.index.dtype, device=call.index.device))
        live = (~dead).reshape(-1).nonzero().squeeze(1)
        return call.summed(call.slot_by_slot(forward, live), live)

    return partial


@contextmanager
def barred(model: PreTrainedModel, folder: ModelFolder, plan: Plan) -> Iterator[None]:
    """While it lasts, the routers of the loaded source cannot choose an expert that `plan` drops.

    Layers that the model does not have, such as multi-token-prediction layers, are passed over.
    """
    layers = {layer: plan.layers[layer] for layer in folder.counts}
    text = text_model(model, folder)
    with ExitStack() as stack:
        if folder.config.text.model_type == RUNS_EVERY_EXPERT:
            for name, module in text.named_modules():
                layer = layer_of(name)
                if name.endswith(".router") and layer in layers:
                    stack.enter_context(_barred_router(module, layers[layer]))
        else:
            main = Plan(layers=layers, criterion=plan.criterion)
            stack.enter_context(barred_experts(describe_moe(text), main))
        yield


@contextmanager
def _barred_router(router: nn.Module, layer_plan: LayerPlan) -> Iterator[None]:
    """A router that gives (scores (T, E), logits (T, E)): it sees the kept rows, the others score 0.

    Its weight is taken while it runs: of a model that is read layer by layer it is there only then.
    """
    whole: list[nn.Parameter] = []

    def bar(module: nn.Module, args: Any) -> None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        whole.append(weight)
        kept = torch.tensor(layer_plan.order, device=weight.device)
        module.weight = nn.Parameter(weight.detach()[kept], requires_grad=False)

    def spread(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        module.weight = whole.pop()
        kept = torch.tensor(layer_plan.order, device=output[0].device)
        return tuple(
            value.new_full((len(value), layer_plan.experts_before), fill).index_copy_(1, kept, value)
            for value, fill in zip(output, (0.0, float("-inf")), strict=True)
        )

    before = router.register_forward_pre_hook(bar)
    after = router.register_forward_hook(spread)
    try:
        yield
    finally:
        before.remove()
        after.remove()
