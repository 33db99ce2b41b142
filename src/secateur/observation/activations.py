"""Record what the experts of a live model do, in its own forward pass: the sums of `stats.SUMS`.

transformers' grouped and batched experts functions put the outputs of all token-slots through an optional
`post_expert_norm` just before they multiply by the gates. While it is observed, an `experts` module has one that
takes note and hands on what it was given: the model computes the same bits, and no expert runs on a token that
was not routed to it. Experts with another forward (eager, a family of its own kind) run a second time, each
token-slot as a token of its own with gate 1, because their forward shows nothing but the sum.

The experts of image models (V-MoE) are called with the pairs that found a place, each as a token with one slot. Only
these are recorded; the tokens that the router saw are counted where they enter the layer.

Legend: T tokens of a call, K top-k, S = T * K token-slots, E experts, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import SecateurError
from secateur.families import MoEBlock, MoEModel
from secateur.observation.call import ExpertsCall, read_call
from secateur.observation.real_tokens import tokens_and_mask
from secateur.observation.running_sums import RunningSums
from secateur.observation.shown import (
    ROWS,
    as_routed,
    implementation_of,
    needs_neurons,
    neurons_shown,
    outputs_shown,
)
from secateur.stats import SUMS, LayerStats, RouterStats, Seen, recorded
from secateur.stats.sums import NO_NEURONS, ByRouter

TOLERANCE = 0.02  # above what sums in bfloat16 lose, far below what gates on wrong outputs change


class ActivationObserver:
    """Running sums of every MoE layer of one model, in evaluation mode only; padding is left out.

    Call the model with an `attention_mask` of shape (B, S), or none where nothing is padding; a model of images with
    `pixel_values`.
    """

    def __init__(self, moe: MoEModel, *, sums: Iterable[str] = ()) -> None:
        """
        Args:
            sums: names in `stats.SUMS` to record beside those by default.

        Raises:
            SecateurError: the model is split over ranks, none of which sees whole outputs of experts; no such sum, or
                one that cannot be observed in these experts.
        """
        sums = tuple(sums)
        split = getattr(moe.model.config, "distributed_config", None)
        if split is not None and max(split.tp_size, split.ep_size, split.pp_size) > 1:
            raise SecateurError(f"activations are observed on whole experts, found a model that is split: {split}")
        for block in moe.blocks.values():
            check_observable(block, sums)
        self._signature = inspect.signature(moe.model.forward)
        self.layers = {layer: LayerObserver(block, sums=sums) for layer, block in moe.blocks.items()}
        if moe.model.main_input_name == "pixel_values":
            self._handles = [
                handle
                for layer, layer_observer in self.layers.items()
                for handle in _around(moe.blocks[layer].block, layer_observer)
            ]
        else:
            self._handles = [
                moe.model.register_forward_pre_hook(self._begin, with_kwargs=True),
                moe.model.register_forward_hook(self._end, always_call=True),
            ]

    def read(self) -> RouterStats:
        """The statistics so far, on the host.

        Raises:
            SecateurError: a layer recorded nothing, or an output or gate was not finite.
        """
        return RouterStats(layers={layer: layer_observer.read() for layer, layer_observer in self.layers.items()})

    def detach(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        for layer_observer in self.layers.values():
            layer_observer.detach()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            return
        _, mask = tokens_and_mask(self._signature, args, kwargs)
        for layer_observer in self.layers.values():
            layer_observer.start(mask)

    def _end(self, *_: Any) -> None:
        for layer_observer in self.layers.values():
            layer_observer.stop()


class LayerObserver:
    """Running sums of one MoE layer, filled by the calls of its `experts` module between `start` and `stop`.

    The host waits for the device in `read`, and in the first call, which also checks that the outputs that were seen
    add up to the layer's.
    """

    def __init__(self, block: MoEBlock, *, sums: Iterable[str] = ()) -> None:
        """
        Args:
            sums: names in `stats.SUMS` to record beside those by default.

        Raises:
            SecateurError: the experts are split over ranks, or observed already; no such sum, or one that cannot be
                observed in these experts.
        """
        names = recorded(sums)
        check_observable(block, names)
        self._block = block
        self._experts: Any = block.experts
        self._forward: Callable[..., Tensor] = block.experts.forward
        self._own_forward = vars(block.experts).get("forward")
        vars(block.experts)["forward"] = self._observed
        self._running = self._checked = False
        self._keep: Tensor | None = None
        self._routed: int | None = None
        self._sums = RunningSums(names, block.num_experts)
        self._shows_neurons = needs_neurons(names)
        self._handles: list[RemovableHandle] = []
        if any(isinstance(SUMS[name].measure, ByRouter) for name in names):
            self._handles.append(block.router.register_forward_pre_hook(self._router_called, with_kwargs=True))

    def start(self, keep: Tensor | None = None, *, routed: int | None = None) -> None:
        """Record the calls from now on.

        Args:
            keep: of any shape with T entries, 0 or False for padding. routed: tokens that the router sees in them,
                where the experts are called with less: with the pairs that found a place.
        """
        self._running, self._keep = True, None if keep is None else keep.reshape(-1).to(torch.bool)
        if routed is not None:
            self._routed = (self._routed or 0) + routed

    def stop(self) -> None:
        self._running, self._keep = False, None

    def read(self) -> LayerStats:
        """The sums so far.

        Raises:
            SecateurError: nothing was recorded, or an output or gate was not finite.
        """
        if self._sums.is_empty:
            raise SecateurError(f"{self._block.name}.experts never ran while they were observed in evaluation mode")
        try:
            return self._sums.read(self._routed)
        except SecateurError as error:
            raise SecateurError(f"{self._block.name}.experts: {error}") from None

    def detach(self) -> None:
        """Leave the module as it was found."""
        for handle in self._handles:
            handle.remove()
        del vars(self._experts)["forward"]
        if self._own_forward is not None:
            vars(self._experts)["forward"] = self._own_forward

    def _observed(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._running:
            return self._forward(*args, **kwargs)
        call = read_call(f"{self._block.name}.experts", args, kwargs)
        rows = ROWS.get(implementation_of(self._experts))
        shown: list[Tensor] = []  # (S, D) outputs before the gates
        neurons: list[Tensor] = []  # (S, F) what the down projection is given
        with ExitStack() as stack:
            if rows is not None:
                stack.enter_context(outputs_shown(self._experts, shown))
                if self._shows_neurons:
                    stack.enter_context(neurons_shown(self._experts, neurons))
            result = self._forward(*args, **kwargs)
        with torch.no_grad():
            if rows is None or not shown:
                rows, shown, neurons = as_routed, [call.slot_by_slot(self._forward)], []
            self._record(shown[0], neurons[0] if neurons else None, rows(call.index), call, result)
        return result

    def _record(
        self, outputs: Tensor, neurons: Tensor | None, order: Tensor, call: ExpertsCall, result: Tensor
    ) -> None:
        index = call.index
        gates, experts = call.gates.reshape(-1)[order], index.reshape(-1)[order].to(torch.int64)
        tokens = order // index.shape[1]
        if not self._checked:
            self._check(outputs, gates, tokens, result)
            self._checked = True
        keep = self._kept(len(index), "experts", outputs.device)
        if keep is not None:
            experts = experts.masked_fill(~keep[tokens], self._block.num_experts)
        seen = Seen(
            name=f"{self._block.name}.experts",
            num_experts=self._block.num_experts,
            outputs=outputs,
            gates=gates.double(),
            experts=experts,
            tokens=tokens,
            inputs=call.tokens,
            activations=neurons,
            by_pairs=self._routed is not None,
        )
        self._sums.add_call(seen, keep)

    def _router_called(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            return
        given = next(iter((*args, *kwargs.values())), None)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise SecateurError(f"{self._block.name}: expected its router to be called with tokens first")
        with torch.no_grad():
            tokens = given.reshape(-1, given.shape[-1])
            self._sums.add_router_call(tokens, self._kept(len(tokens), "router", tokens.device))

    def _kept(self, num_tokens: int, what: str, device: torch.device) -> Tensor | None:
        """(T,) the mask of a call with so many tokens."""
        if self._keep is not None and len(self._keep) != num_tokens:
            raise SecateurError(
                f"{self._block.name}.{what}: ran on {num_tokens} tokens, but the mask has {len(self._keep)}"
            )
        return None if self._keep is None else self._keep.to(device)

    def _check(self, outputs: Tensor, gates: Tensor, tokens: Tensor, result: Tensor) -> None:
        result = result.reshape(-1, outputs.shape[1]).float()
        seen = torch.zeros_like(result).index_add_(0, tokens, (outputs * gates[:, None]).float())
        finite = result.isfinite().all(dim=1)  # padding may be anything
        difference, size = float((seen - result)[finite].norm()), float(result[finite].norm())
        if not difference <= TOLERANCE * size:
            raise SecateurError(
                f"{self._block.name}.experts: the observed outputs do not add up to the layer's output (a difference "
                f"of {difference:.3g} in {size:.3g}), so this experts implementation "
                f"({implementation_of(self._experts)}) cannot be observed; try "
                "model.set_experts_implementation('eager')"
            )


def _around(layer: nn.Module, observer: LayerObserver) -> list[RemovableHandle]:
    """Hooks on an MoE layer of a model of images, whose tokens (rows, L, D) are all real."""

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            observer.start(routed=args[0].shape[:-1].numel())

    def end(*_: Any) -> None:
        observer.stop()

    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]


def check_observable(block: MoEBlock, sums: Iterable[str] = ()) -> None:
    """Raises SecateurError when experts are split over ranks (none sees all), observed already, or hide a sum."""
    if getattr(block.experts, "_is_expert_parallel", False):
        raise SecateurError(f"{block.name}.experts are split over ranks; activations are observed on whole experts")
    if isinstance(getattr(block.experts.forward, "__self__", None), LayerObserver):
        raise SecateurError(f"{block.name}.experts are observed already; detach the first observer")
    if needs_neurons(sums) and implementation_of(block.experts) not in ROWS:
        raise SecateurError(f"{block.name}.experts: {NO_NEURONS}")
