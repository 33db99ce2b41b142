"""Record what the experts of a live model do, in its own forward pass: their gates and the norms of their outputs.

transformers' grouped and batched experts functions put the outputs of all token-slots through an optional
`post_expert_norm` just before they multiply by the gates. While it is observed, an `experts` module has one that
takes the norms and hands on what it was given: the model computes the same bits, and no expert runs on a token that
was not routed to it. Experts with another forward (eager, a family of its own kind) run a second time, each
token-slot as a token of its own with gate 1, because their forward shows nothing but the sum.

The experts of image models (V-MoE) are called with the pairs that found a place, each as a token with one slot. Only
these are recorded; the tokens that the router saw are counted where they enter the layer.

Legend: T tokens of a call, K top-k, S = T * K token-slots, E experts, D model width.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import SecateurError
from secateur.families import MoEBlock, MoEModel
from secateur.observation.call import ExpertsCall, read_call, tokens_and_mask
from secateur.stats import LayerStats, RouterStats

ADDED = ("weight_sum", "norm_sum", "norm_square_sum", "weighted_norm_sum")
TOLERANCE = 0.02  # above what sums in bfloat16 lose, far below what gates on wrong outputs change


class ActivationObserver:
    """Running sums of every MoE layer of one model, in evaluation mode only; padding is left out.

    Call the model with an `attention_mask` of shape (B, S), or none where nothing is padding; a model of images with
    `pixel_values`.
    """

    def __init__(self, moe: MoEModel) -> None:
        """
        Raises:
            SecateurError: the model is split over ranks, none of which sees whole outputs of experts.
        """
        split = getattr(moe.model.config, "distributed_config", None)
        if split is not None and max(split.tp_size, split.ep_size, split.pp_size) > 1:
            raise SecateurError(f"activations are observed on whole experts, found a model that is split: {split}")
        for block in moe.blocks.values():
            check_observable(block)
        self._signature = inspect.signature(moe.model.forward)
        self.layers = {layer: LayerObserver(block) for layer, block in moe.blocks.items()}
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
        """The statistics so far, with every field, on the host.

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

    def __init__(self, block: MoEBlock) -> None:
        """
        Raises:
            SecateurError: the experts are split over ranks, or observed already.
        """
        check_observable(block)
        self._block = block
        self._experts: Any = block.experts
        self._forward: Callable[..., Tensor] = block.experts.forward
        self._own_forward = vars(block.experts).get("forward")
        vars(block.experts)["forward"] = self._observed
        self._running = self._checked = False
        self._keep: Tensor | None = None
        self._routed: int | None = None
        self._sums: _Sums | None = None

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
        """The sums so far, with every field of LayerStats.

        Raises:
            SecateurError: nothing was recorded, or an output or gate was not finite.
        """
        if self._sums is None:
            raise SecateurError(f"{self._block.name}.experts never ran while they were observed in evaluation mode")
        try:
            found = self._sums.read()
            return found if self._routed is None else dataclasses.replace(found, num_tokens=self._routed)
        except SecateurError as error:
            raise SecateurError(f"{self._block.name}.experts: {error}") from None

    def detach(self) -> None:
        """Leave the module as it was found."""
        del vars(self._experts)["forward"]
        if self._own_forward is not None:
            vars(self._experts)["forward"] = self._own_forward

    def _observed(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._running:
            return self._forward(*args, **kwargs)
        call = read_call(f"{self._block.name}.experts", args, kwargs)
        rows = ROWS.get(_implementation(self._experts))
        shown: list[Tensor] = []  # (S, D) outputs before the gates
        with _outputs_shown(self._experts, shown) if rows is not None else nullcontext():
            result = self._forward(*args, **kwargs)
        with torch.no_grad():
            if rows is None or not shown:
                rows, shown = _as_routed, [call.slot_by_slot(self._forward)]
            self._record(shown[0], rows(call.index), call, result)
        return result

    def _record(self, outputs: Tensor, order: Tensor, call: ExpertsCall, result: Tensor) -> None:
        index = call.index
        gates, experts = call.gates.reshape(-1)[order], index.reshape(-1)[order].to(torch.int64)
        tokens = order // index.shape[1]
        if not self._checked:
            self._check(outputs, gates, tokens, result)
            self._checked = True
        if self._sums is None:
            self._sums = _Sums(self._block.num_experts, outputs.device)
        keep = None if self._keep is None else self._keep.to(outputs.device)
        if keep is not None and len(keep) != len(index):
            raise SecateurError(f"{self._block.name}.experts: ran on {len(index)} tokens, but the mask has {len(keep)}")
        self._sums.add(outputs, gates, experts, len(index), keep, tokens)

    def _check(self, outputs: Tensor, gates: Tensor, tokens: Tensor, result: Tensor) -> None:
        result = result.reshape(-1, outputs.shape[1]).float()
        seen = torch.zeros_like(result).index_add_(0, tokens, (outputs * gates[:, None]).float())
        finite = result.isfinite().all(dim=1)  # padding may be anything
        difference, size = float((seen - result)[finite].norm()), float(result[finite].norm())
        if not difference <= TOLERANCE * size:
            raise SecateurError(
                f"{self._block.name}.experts: the observed outputs do not add up to the layer's output (a difference "
                f"of {difference:.3g} in {size:.3g}), so this experts implementation "
                f"({_implementation(self._experts)}) cannot be observed; try model.set_experts_implementation('eager')"
            )


def _around(layer: nn.Module, observer: LayerObserver) -> list[RemovableHandle]:
    """Hooks on an MoE layer of a model of images, whose tokens (rows, L, D) are all real."""

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            observer.start(routed=args[0].shape[:-1].numel())

    def end(*_: Any) -> None:
        observer.stop()

    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]


def check_observable(block: MoEBlock) -> None:
    """Raises SecateurError when the experts are split over ranks (none sees whole outputs), or observed already."""
    if getattr(block.experts, "_is_expert_parallel", False):
        raise SecateurError(f"{block.name}.experts are split over ranks; activations are observed on whole experts")
    if isinstance(getattr(block.experts.forward, "__self__", None), LayerObserver):
        raise SecateurError(f"{block.name}.experts are observed already; detach the first observer")


class _Sums:
    """The accumulators of one layer, on the device; the last row of each takes padding."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._count = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        self._added = torch.zeros(num_experts + 1, len(ADDED), dtype=torch.float64, device=device)
        self._max = torch.zeros(num_experts + 1, dtype=torch.float64, device=device)

    def add(
        self, outputs: Tensor, gates: Tensor, experts: Tensor, num_tokens: int, keep: Tensor | None, tokens: Tensor
    ) -> None:
        """outputs (S, D), gates, experts and tokens (S,) of the slots in one order; keep (T,) bool."""
        if keep is not None:
            experts = experts.masked_fill(~keep[tokens], len(self._count) - 1)
        self._num_tokens += num_tokens if keep is None else keep.sum()
        wide = torch.promote_types(outputs.dtype, torch.float32)
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=wide).double()
        largest = torch.maximum(outputs.amax(-1), outputs.amin(-1).neg()).double()
        gates = gates.double()
        self._count.scatter_add_(0, experts, torch.ones_like(experts))
        self._added.index_add_(0, experts, torch.stack((gates, norms, norms.square(), gates * norms), dim=-1))
        self._max.scatter_reduce_(0, experts, largest, "amax")

    def read(self) -> LayerStats:
        return LayerStats(
            num_tokens=int(self._num_tokens),
            token_count=self._count[:-1],
            max_activation=self._max[:-1],
            **dict(zip(ADDED, self._added[:-1].unbind(dim=1), strict=True)),
        )


def _sorted_by_expert(index: Tensor) -> Tensor:
    """The very sort of the grouped experts function, in which slots of one expert may come in any order."""
    return torch.sort(index.reshape(-1)).indices


def _as_routed(index: Tensor) -> Tensor:
    return torch.arange(index.numel(), device=index.device)


# experts implementation of transformers -> the slot (token * K + k) of each row that `post_expert_norm` sees
ROWS: dict[str | None, Callable[[Tensor], Tensor]] = {"grouped_mm": _sorted_by_expert, "batched_mm": _as_routed}


def _implementation(experts: Any) -> str | None:
    """The experts function that transformers runs in place of the module's forward, None for a family without."""
    if not hasattr(experts, "has_post_expert_norm"):
        return None
    name: str | None = experts.config._experts_implementation
    return name


@contextmanager
def _outputs_shown(experts: Any, shown: list[Tensor]) -> Iterator[None]:
    """While it lasts, the experts function of transformers appends its (S, D) outputs before the gates to `shown`."""
    had_norm = experts.has_post_expert_norm
    norm = experts.post_expert_norm if had_norm else None

    def show(outputs: Tensor) -> Tensor:
        outputs = outputs if norm is None else norm(outputs)
        shown.append(outputs)
        return outputs

    # The instance's own dictionary hides a submodule of that name without touching it.
    vars(experts).update(has_post_expert_norm=True, post_expert_norm=show)
    try:
        yield
    finally:
        del vars(experts)["post_expert_norm"]
        vars(experts)["has_post_expert_norm"] = had_norm
