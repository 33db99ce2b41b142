"""The barred-experts oracle for every model that can be pruned on the disk, text models inside others among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.checkpoint.rewrite import layer_plan
from secateur.checkpoint.survey import Survey
from secateur.errors import SecateurError
from secateur.families import describe_moe
from secateur.modeling_secateur import layer_of
from secateur.plan import LayerPlan, Plan
from secateur.verify import barred_experts

RUNS_EVERY_EXPERT = "llama4_text"  # its experts are not called with what the router chose


@contextmanager
def barred(model: PreTrainedModel, survey: Survey, plan: Plan) -> Iterator[None]:
    """While it lasts, the routers of the loaded source cannot choose an expert that `plan` drops.

    Layers that the model does not have, such as multi-token-prediction layers, are passed over.
    """
    layers = {layer: layer_plan(survey, plan, layer) for layer in survey.counts}
    text = text_model(model, survey)
    with ExitStack() as stack:
        if survey.model.text.model_type == RUNS_EVERY_EXPERT:
            for name, module in text.named_modules():
                layer = layer_of(name)
                if name.endswith(".router") and layer in layers:
                    stack.enter_context(_barred_router(module, layers[layer]))
        else:
            main = Plan(layers=layers, criterion=plan.criterion)
            stack.enter_context(barred_experts(describe_moe(text), main))
        yield


def text_model(model: PreTrainedModel, survey: Survey) -> PreTrainedModel:
    """The model that holds the decoder layers: `model` itself, or one inside it."""
    if not survey.model.is_nested:
        return model
    wanted = survey.model.text.model_type
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type == wanted:
            return module
    raise SecateurError(f"{type(model).__name__}: no {wanted} model inside it")


@contextmanager
def _barred_router(router: nn.Module, one: LayerPlan) -> Iterator[None]:
    """A router that gives (scores (T, E), logits (T, E)): it sees the kept rows, the others score 0."""
    weight = router.weight
    assert isinstance(weight, nn.Parameter)
    kept = torch.tensor(one.order, device=weight.device)

    def spread(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            value.new_full((len(value), one.experts_before), fill).index_copy_(1, kept, value)
            for value, fill in zip(output, (0.0, float("-inf")), strict=True)
        )

    router.weight = nn.Parameter(weight.detach()[kept], requires_grad=False)
    handle = router.register_forward_hook(spread)
    try:
        yield
    finally:
        handle.remove()
        router.weight = weight
