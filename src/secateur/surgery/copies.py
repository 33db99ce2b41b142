"""What follows the prunings of a model: averages of its weights, reference models, tensors that a script keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.errors import SecateurError
from secateur.expert_axis import ExpertTensor, check_axis, gather
from secateur.families import MoEModel, describe_moe, without_adapters
from secateur.plans import Plan
from secateur.surgery.module import take_value_

# a model of the same kind; or tensors like its parameters, by their names or in the order of `parameters()`
Copy = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


class KeptTensors:
    """Tensors with experts that a script keeps beside a model, such as an average that it makes itself."""

    def __init__(self, moe: MoEModel, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        """
        Raises:
            SecateurError: a list that is not as long as that of the parameters (all, or all that are trained), no name
                of the model's, or a tensor of another shape.
        """
        specs = {spec.name: (layer, spec) for layer, block in moe.blocks.items() for spec in block.tensors}
        named = _named(moe.model, tensors)
        self._kept: list[tuple[int, ExpertTensor, Tensor]] = []
        for name, tensor in named.items():
            if name in specs:
                layer, spec = specs[name]
                check_axis(tensor.shape, spec, moe.counts[layer])
                self._kept.append((layer, spec, tensor))
        if not self._kept:
            raise SecateurError(
                f"copies: found tensors named {', '.join(list(named)[:3])}, ..., expected names of parameters of the "
                f"model, such as {next(iter(specs))}"
            )

    @torch.no_grad()
    def prune_(self, plan: Plan) -> None:
        """Give the tensors the shape that the model has after a plan; they stay the objects that they are."""
        for layer, spec, tensor in self._kept:
            if layer in plan.layers and not plan.layers[layer].is_identity:
                take_value_(tensor, gather(tensor, spec, plan.layers[layer]))


def _named(model: nn.Module, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Mapping[str, Tensor]:
    if isinstance(tensors, Mapping):
        return tensors
    parameters = list(model.named_parameters())
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    of = next((some for some in (parameters, trained) if len(some) == len(tensors)), None)
    if of is None:
        raise SecateurError(
            f"copies: found a list of {len(tensors)} tensors, expected one for each of the {len(parameters)} parameters"
            f" or of the {len(trained)} that are trained"
        )
    return {name: tensor for (name, _), tensor in zip(of, tensors, strict=True)}


def copies_of(moe: MoEModel, copies: Iterable[Copy]) -> tuple[list[MoEModel], list[KeptTensors]]:
    """What is to follow `moe`: the descriptions of models (AveragedModel and PEFT are seen through), and kept tensors.

    Raises:
        SecateurError: a model that is the model itself or has other experts; see also `KeptTensors`.
    """
    models, kept = [], []
    for one in copies:
        if not isinstance(one, nn.Module):
            kept.append(KeptTensors(moe, one))
            continue
        inner = without_adapters(one.module if isinstance(one, AveragedModel) else one)
        if inner is moe.model:
            raise SecateurError("copies: found the model that is trained, expected copies of it")
        copy = describe_moe(inner, moe.layout)
        if copy.counts != moe.counts:
            raise SecateurError(f"copies: found a model with experts {copy.counts}, expected {moe.counts} as the model")
        models.append(copy)
    return models, kept
