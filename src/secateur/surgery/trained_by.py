"""Which optimizer trains which expert: found at the start, and seen again at a pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.families import MoEModel, tensor_at

SKIPPED = 10  # steps that a GradScaler may skip after a start


class TrainedBy:
    """The optimizers of one model.

    Args:
        moe: of the model. optimizers: without wrappers, see `optimizer.each_of`.

    Attributes:
        optimizers: as given. param_groups: those of all of them, in order.
    """

    def __init__(self, moe: MoEModel, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._moe = moe
        self._stepped = [False] * len(self.optimizers)  # since `watch`
        self._since = 0  # steps of any of them since `waits` was asked last
        self._versions: list[tuple[int, int]] = []  # of parameters, as of then
        self._handles: list[Any] = [
            one.register_step_post_hook(self._noter(index)) for index, one in enumerate(self.optimizers)
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self.optimizers for group in one.param_groups]

    def watch(self) -> None:
        """From now on each optimizer is expected to step, and no other to train experts or routers.

        Raises:
            SecateurError: a trainable tensor of experts or routers is in none of the optimizers.
        """
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for name, parameter in _trainable(self._moe):
            if id(parameter) not in held:
                raise SecateurError(
                    f"{name} is trained, but not a parameter of {self._names}: a pruning would take it out of the "
                    "hands of the optimizer that has it. Give all optimizers of the model, as they are after "
                    "everything that makes new ones (one that holds copies, such as fp32 master weights, cannot be "
                    "followed), or freeze it (requires_grad_(False))"
                )
        self._stepped[:] = [False] * len(self.optimizers)

    def waits(self) -> bool:
        """Whether gradients are being gathered: there are some, and since the last call nothing has stepped.

        Looks at the first layer that is trained, where also an optimizer shows that was not given.
        """
        stepped, self._since = self._since > 0, 0
        first = [parameter for _, parameter in _trainable(self._moe, layers=1)]
        before, self._versions = self._versions, [(id(one), one._version) for one in first]
        return not stepped and before in ([], self._versions) and any(one.grad is not None for one in first)

    def check_stepped(self, moe: MoEModel, num_steps: int) -> None:
        """Call at a pruning, before it, `num_steps` steps after `watch`.

        Raises:
            SecateurError: an optimizer that holds trainable experts or routers has not stepped since `watch`.
        """
        self._moe = moe
        idle = [
            (one, {id(parameter) for group in one.param_groups for parameter in group["params"]})
            for one, stepped in zip(self.optimizers, self._stepped, strict=True)
            if not stepped
        ]
        for name, parameter in _trainable(moe) if idle else ():
            for one, held in idle:
                if id(parameter) in held and (num_steps > SKIPPED or not one.state.get(parameter)):
                    raise SecateurError(
                        f"{name}: {type(one).__name__}, which was given to LAEP for it, has not stepped since: nothing "
                        "is pruned. Is another optimizer training the model? LAEP needs the one whose step() is called"
                    )

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def _names(self) -> str:
        return " or ".join(type(one).__name__ for one in self.optimizers) or "any optimizer"

    def _noter(self, index: int) -> Any:
        def note(*_: Any) -> None:
            self._stepped[index] = True
            self._since += 1

        return note


def _trainable(moe: MoEModel, layers: int | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every tensor with an expert axis that is trained; in the first `layers` that have some."""
    for block in moe.blocks.values():
        if layers == 0:
            return
        found = [(spec.name, tensor_at(moe.model, spec.name)) for spec in block.tensors]
        trained = [(name, one) for name, one in found if isinstance(one, nn.Parameter) and one.requires_grad]
        layers = layers if layers is None or not trained else layers - 1
        yield from trained
