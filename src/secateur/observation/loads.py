"""Count, on the device, how many tokens each expert of a training model really gets.

The count is taken from the arguments of the `experts` module: the router's decision after biases, groups and
normalisation, never recomputed. It runs only while the root model's own forward runs, so what activation
checkpointing computes again during the backward pass is not counted twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import MoEBlock, MoEModel
from secateur.observation.call import read_index, tokens_and_mask
from secateur.stats import LayerStats, RouterStats


class LoadCounter:
    """Running token counts of every MoE layer of one model, in training mode only.

    Legend: T tokens of a micro-batch, K top-k, E experts. No host synchronisation until `read`.
    """

    def __init__(self, moe: MoEModel) -> None:
        self._model = moe.model
        root = moe.model.base_model  # below the head: PEFT and some trainers never call the model itself
        self._signature = inspect.signature(root.forward)
        kinds = {parameter.kind for parameter in self._signature.parameters.values()}
        self._takes_more = inspect.Parameter.VAR_KEYWORD in kinds
        self._keep: Tensor | None = None  # (T,) 1 for real tokens, 0 for padding
        self._counting = False
        self._handles = [
            root.register_forward_pre_hook(self._begin, with_kwargs=True),
            root.register_forward_hook(self._end, always_call=True),
        ]
        for block in moe.blocks.values():
            self._handles.append(block.experts.register_forward_pre_hook(self._hook(block), with_kwargs=True))
        self.reset(moe)

    def reset(self, moe: MoEModel) -> None:
        """Set all counts to zero; expert counts are taken from `moe`."""
        self._sizes = moe.counts
        self._counts: dict[int, Tensor] = {}
        self._num_tokens: Tensor | None = None

    def read(self) -> RouterStats:
        """The counts since the last reset, on the host.

        Raises:
            SecateurError: no training forward has run since the last reset.
        """
        if self._num_tokens is None:
            raise SecateurError("no token was counted: the model has not run in training mode since the last reset")
        num_tokens = int(self._num_tokens)
        layers = {
            layer: LayerStats(num_tokens=num_tokens, token_count=self._counts[layer].cpu())
            for layer in self._sizes
            if layer in self._counts
        }
        missing = sorted(set(self._sizes) - set(layers))
        if missing:
            raise SecateurError(f"layers {missing} never ran their experts, though the model ran")
        return RouterStats(layers=layers)

    @property
    def is_empty(self) -> bool:
        return self._num_tokens is None

    def load(self, stats: RouterStats) -> None:
        """Continue from counts that `read` gave, e.g. after a restart in the middle of a window."""
        device = next(self._model.parameters()).device
        self._counts = {layer: layer_stats.token_count.to(device) for layer, layer_stats in stats.layers.items()}
        tokens = next(iter(stats.layers.values())).num_tokens
        self._num_tokens = torch.tensor(tokens, dtype=torch.int64, device=device)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._counting = model.training
        if not self._counting:
            return
        if not self._takes_more:
            kwargs = {name: value for name, value in kwargs.items() if name in self._signature.parameters}
        tokens, mask = tokens_and_mask(self._signature, args, kwargs)
        if mask is None:
            self._keep = None
            # filled on the device: a copy from the host would make it wait
            num_tokens = torch.full((), tokens.numel(), dtype=torch.int64, device=tokens.device)
        else:
            self._keep = mask.reshape(-1).to(torch.int64)
            num_tokens = self._keep.sum()
        self._num_tokens = num_tokens if self._num_tokens is None else self._num_tokens + num_tokens

    def _end(self, *_: Any) -> None:
        self._counting = False
        self._keep = None

    def _hook(self, block: MoEBlock) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        layer, name = block.layer, f"{block.name}.experts"

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._counting:
                return
            index = read_index(name, args, kwargs)  # (T, K)
            if layer not in self._counts:
                self._counts[layer] = torch.zeros(self._sizes[layer], dtype=torch.int64, device=index.device)
            keep = torch.ones_like(index) if self._keep is None else self._keep[:, None].expand_as(index)
            self._counts[layer].scatter_add_(0, index.reshape(-1).to(torch.int64), keep.reshape(-1).to(torch.int64))

        return count
