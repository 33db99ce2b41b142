"""Count, on the device, how many tokens each expert of a training model really gets.

The count is taken from the arguments of the `experts` module: the router's decision after biases, groups and
normalisation, never recomputed. Each training token counts once:

* Only forwards in training mode with gradients enabled count; `generate` and passes under `no_grad` do not.
* What activation checkpointing computes again in the backward pass does not count, whether the script checkpoints
  parts of the model or the whole of it; where the first pass ran without gradients (a reentrant checkpoint around the
  whole model), the second counts.
* Padding does not count, where the call tells it (see `real_tokens`).

The forward of the model itself need not run: a script may call the layers in a way of its own. Then all tokens count.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from secateur.errors import SecateurError
from secateur.families import MoEBlock, MoEModel
from secateur.observation.call import read_index
from secateur.observation.hooks import OfOneModel
from secateur.observation.real_tokens import (
    IGNORED,
    at_the_ends,
    by_name,
    padding_by_labels,
    real_by_mask,
    tokens_of,
)
from secateur.stats import LayerStats, RouterStats

# from the arguments of a forward, by name, to which of its tokens count: (B, S), 0 for those that do not; None: all
CountMask = Callable[[Mapping[str, Any]], Tensor | None]

REMEMBERED = 64  # forwards; more are looked through for those whose tokens are gone


class LoadCounter:
    """Running token counts of every MoE layer of one model, in training mode only.

    Legend: B rows, S tokens a row, T = B * S tokens of a micro-batch, K top-k, E experts. No host synchronisation until
    `read`.

    Args:
        callers: modules around the model through which the script calls it, such as a PeftModel: one of them may be the
            only one that sees the labels.
        count_mask: tells which tokens count, instead of the attention mask.

    Attributes:
        sample: (1, S) the ids of the first row of the last forward that counted, None before one.
    """

    def __init__(
        self, moe: MoEModel, *, callers: Iterable[nn.Module] = (), count_mask: CountMask | None = None
    ) -> None:
        self._model = moe.model
        root = moe.model.base_model  # below the head: PEFT and some trainers never call the model itself
        self._signature = inspect.signature(root.forward)
        text_config = moe.model.config.get_text_config()
        pad_id = getattr(text_config, "pad_token_id", None)
        self._pad_id: int | None = pad_id if isinstance(pad_id, int) and pad_id >= 0 else None
        self._count_mask = count_mask
        self._running = False  # the root's own forward
        self._counts_now = False
        self._paused = False
        self._keep: Tensor | None = None  # (T,) 1 for real tokens, 0 for padding
        self._num_real: Tensor | None = None
        self._labels: dict[int, Any] = {}  # of the callers that run
        self._counted: dict[int, StorageWeakRef] = {}  # the tokens of forwards that counted, while they are alive
        self._seen: set[int] = set()  # layers that counted outside of a backward pass
        self._doubtful: Tensor | None = None
        self._of_doubt = 0
        self.sample: Tensor | None = None
        self._handles = [
            root.register_forward_pre_hook(OfOneModel(self._begin), with_kwargs=True),
            root.register_forward_hook(OfOneModel(self._end), always_call=True),
        ]
        for caller in dict.fromkeys((*callers, moe.model)):
            if caller is not root:
                before, after = self._around(inspect.signature(caller.forward))
                self._handles.append(caller.register_forward_pre_hook(OfOneModel(before), with_kwargs=True))
                self._handles.append(caller.register_forward_hook(OfOneModel(after), always_call=True))
        for block in moe.blocks.values():
            hook = OfOneModel(self._hook(block))
            self._handles.append(block.experts.register_forward_pre_hook(hook, with_kwargs=True))
        self.reset(moe)

    def reset(self, moe: MoEModel) -> None:
        """Set all counts to zero; expert counts are taken from `moe`."""
        self._sizes = moe.counts
        self._counts: dict[int, Tensor] = {}
        self._num_tokens: dict[int, Tensor] = {}

    def read(self) -> RouterStats:
        """The counts since the last reset, on the host.

        Raises:
            SecateurError: no training forward has run since the last reset.
        """
        if not self._counts:
            raise SecateurError(
                "no token was counted: the model has not run in training mode, with gradients, since the last reset"
            )
        layers = {
            layer: LayerStats(num_tokens=int(self._num_tokens[layer]), token_count=self._counts[layer].cpu())
            for layer in self._sizes
            if layer in self._counts
        }
        missing = sorted(set(self._sizes) - set(layers))
        if missing:
            raise SecateurError(f"layers {missing} never ran their experts, though the model ran")
        return RouterStats(layers=layers)

    @property
    def is_empty(self) -> bool:
        return not self._counts

    def load(self, stats: RouterStats) -> None:
        """Continue from counts that `read` gave, e.g. after a restart in the middle of a window."""
        device = next(self._model.parameters()).device
        self._counts = {layer: one.token_count.to(device) for layer, one in stats.layers.items()}
        self._num_tokens = {
            layer: torch.tensor(one.num_tokens, dtype=torch.int64, device=device) for layer, one in stats.layers.items()
        }

    def doubtful_share(self) -> float:
        """The share of the tokens since the last call that look like padding and were counted; waits for the device.

        They have no target and nothing tells the pad id; or they are pad ids at the ends of rows, without any labels.
        """
        doubtful, of = self._doubtful, self._of_doubt
        self._doubtful, self._of_doubt = None, 0
        return 0.0 if doubtful is None else int(doubtful) / of

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in this block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _around(self, signature: inspect.Signature) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks of a caller, which keep its labels while it runs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            labels = kwargs.get("labels")
            if labels is None and args:
                labels = by_name(signature, args, {}).get("labels")
            self._labels[id(module)] = labels

        def after(module: nn.Module, *_: Any) -> None:
            self._labels.pop(id(module), None)  # none where another hook failed before ours

        return before, after

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running, self._counts_now = True, False
        if not model.training or self._paused or not torch.is_grad_enabled():
            return
        given = by_name(self._signature, args, kwargs)
        tokens = tokens_of(given)
        storage = tokens.untyped_storage()
        if _in_backward() and self._remembers(storage):
            return  # computed again
        real = self._real(given, tokens)
        self._counts_now = True
        if not _in_backward():
            self._remember(storage)
        if given.get("input_ids") is not None:
            self.sample = tokens[:1].detach()
        if real is None:
            self._keep = None
            # filled on the device: a copy from the host would make it wait
            self._num_real = torch.full((), tokens.numel(), dtype=torch.int64, device=tokens.device)
        else:
            self._keep = real.reshape(-1).to(torch.int64)
            self._num_real = self._keep.sum()

    def _real(self, given: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
        """Which of `tokens` (B, S) count, (B, S) bool; None: all."""
        labels = next((one for one in self._labels.values() if isinstance(one, Tensor)), None)
        if self._count_mask is not None:
            mask = self._count_mask({**given, "labels": labels})
            if mask is not None and mask.shape != tokens.shape:
                raise SecateurError(
                    f"count_mask returned {tuple(mask.shape)}, expected {tuple(tokens.shape)}, one number a token"
                )
            return None if mask is None else mask != 0
        mask = given.get("attention_mask")
        real = real_by_mask(mask, tokens, given.get("past_key_values"))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return real
        ids = given.get("input_ids")
        if labels is not None and labels.shape != tokens.shape:
            labels = None
        if ids is not None and labels is not None and self._pad_id is not None:
            words = ~padding_by_labels(ids, labels, self._pad_id)
            return words if real is None else real & words
        if real is None:
            self._doubt(ids, labels, tokens.numel())
        return real

    def _doubt(self, ids: Tensor | None, labels: Tensor | None, num_tokens: int) -> None:
        if labels is not None:
            flags = labels == IGNORED
        elif ids is not None and self._pad_id is not None:
            flags = at_the_ends(ids == self._pad_id)
        else:
            return
        found = flags.sum()
        self._doubtful = found if self._doubtful is None else self._doubtful + found
        self._of_doubt += num_tokens

    def _remember(self, storage: torch.UntypedStorage) -> None:
        if len(self._counted) > REMEMBERED:
            self._counted = {key: one for key, one in self._counted.items() if not one.expired()}  # type: ignore[no-untyped-call]
        self._counted[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _remembers(self, storage: torch.UntypedStorage) -> bool:
        """Whether a forward on tokens in this memory has counted; it is not given to others while a weak reference is
        kept of it."""
        return storage._cdata in self._counted

    def _end(self, *_: Any) -> None:
        self._running = self._counts_now = False
        self._keep = self._num_real = None

    def _hook(self, block: MoEBlock) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        layer, name = block.layer, f"{block.name}.experts"

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (self._counts_now if self._running else self._counts_alone(module, layer)):
                return
            index = read_index(name, args, kwargs)  # (T, K)
            if self._keep is not None and len(self._keep) != len(index):
                raise SecateurError(f"{name}: ran on {len(index)} tokens, but the mask has {len(self._keep)}")
            if layer not in self._counts:
                self._counts[layer] = torch.zeros(self._sizes[layer], dtype=torch.int64, device=index.device)
                self._num_tokens[layer] = torch.zeros((), dtype=torch.int64, device=index.device)
            keep = torch.ones_like(index) if self._keep is None else self._keep[:, None].expand_as(index)
            self._counts[layer].scatter_add_(0, index.reshape(-1).to(torch.int64), keep.reshape(-1).to(torch.int64))
            self._num_tokens[layer] += len(index) if self._num_real is None else self._num_real.to(index.device)
            if self._running or not _in_backward():
                self._seen.add(layer)

        return count

    def _counts_alone(self, experts: nn.Module, layer: int) -> bool:
        """Whether a call outside of the root's forward counts."""
        if not experts.training or self._paused or not torch.is_grad_enabled():
            return False
        return layer not in self._seen or not _in_backward()


def _in_backward() -> bool:
    """Whether this thread runs a backward pass, and so computes again what a checkpoint left out."""
    return torch._C._current_graph_task_id() != -1
