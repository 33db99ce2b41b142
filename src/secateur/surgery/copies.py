"""Models that follow the prunings of another one: an average of its weights, a reference model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim.swa_utils import AveragedModel

from secateur.errors import SecateurError
from secateur.families import MoEModel, describe_moe, without_adapters


def copies_of(moe: MoEModel, models: Iterable[nn.Module]) -> list[MoEModel]:
    """The description of every model that is to follow `moe`; AveragedModel and PEFT are seen through.

    Raises:
        SecateurError: one of them is the model itself, or has other experts.
    """
    found = []
    for model in models:
        inner = without_adapters(model.module if isinstance(model, AveragedModel) else model)
        if inner is moe.model:
            raise SecateurError("copies: found the model that is trained, expected copies of it")
        copy = describe_moe(inner, moe.layout)
        if copy.counts != moe.counts:
            raise SecateurError(f"copies: found a model with experts {copy.counts}, expected {moe.counts} as the model")
        found.append(copy)
    return found
