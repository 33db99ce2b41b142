"""Balance options to compare LAEP with, attached to a live model by hooks; right for layers of different sizes.

The losses are in ``balance_losses``. Nothing here holds an expert count: shapes come from the tensors of each forward,
so a pruning that replaces parameters in place needs no new attach.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from secateur.errors import SecateurError
from secateur.observation.call import read_call
from secateur.observation.hooks import OfOneModel
from secateur.train import balance_losses as losses
from secateur.train.balance_losses import BALANCE, SELECTION_BIAS, Affinity, Loss, describe, is_matrix


class MoEBlock(Protocol):
    """What is read of one MoE layer: its number, dotted name and three modules."""

    @property
    def layer(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def block(self) -> nn.Module: ...
    @property
    def experts(self) -> nn.Module: ...
    @property
    def router(self) -> nn.Module: ...


_attached: WeakSet[nn.Module] = WeakSet()


class BalanceHandle:
    """A balance kind at work on a model; made by `attach_balance`.

    A *training forward* is a call of the model in training mode with gradients enabled. Only then are the routers'
    outputs captured, and only while that call runs: gradient checkpointing recomputes in backward, which is not seen.

    ``last_value``: the auxiliary loss of the last training forward, mean over layers, before coefficient and weight; a
    detached scalar on the model's device. None before the first one and for kinds without a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        blocks: Mapping[int, MoEBlock],
        *,
        model_type: str,
        affinity: Affinity,
        strength: float,
        sum_counts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.kind = kind
        self.model_type = model_type
        self.last_value: Tensor | None = None
        self._model, self._blocks, self._affinity, self._strength = model, dict(blocks), affinity, strength
        self._loss = BALANCE[kind].loss
        self._sum_counts = sum_counts
        self._capturing = False
        self._logits: dict[int, Tensor] = {}
        self._index: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._num_forwards = 0  # training forwards used since the last optimizer step
        self._hooks: list[RemovableHandle] = []
        if kind == "none":
            return
        _attached.add(model)
        for block in self._blocks.values():
            self._hooks.append(block.router.register_forward_hook(OfOneModel(self._router_hook(block))))
            experts_hook = OfOneModel(self._experts_hook(block))
            self._hooks.append(block.experts.register_forward_pre_hook(experts_hook, with_kwargs=True))
        self._hooks.append(model.register_forward_pre_hook(OfOneModel(self._before_forward)))
        self._hooks.append(model.register_forward_hook(OfOneModel(self._after_forward), with_kwargs=True))
        # always_call: a forward that failed must not keep its activations alive
        self._hooks.append(model.register_forward_hook(OfOneModel(self._clear), always_call=True))

    def detach(self) -> None:
        """Remove every hook and counter. The model is as it was, except for what training changed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._counts.clear()
        _attached.discard(self._model)

    def after_optimizer_step(self) -> None:
        """Finish one optimizer step; call it after `optimizer.step()` and before any pruning of that step.

        Kind "bias": update every selection bias in place from the tokens counted since the last call, on the device,
        and start counting from zero. Loss kinds: check that the loss was really added.

        Raises:
            SecateurError: no training forward since the last call, or a bias whose size changed since counting.
        """
        if not self._hooks:
            return
        if not self._num_forwards:
            withheld = "with labels (label smoothing and compute_loss_func withhold them from the model) "
            expected = f"at least one training forward {withheld if self._loss else ''}since the last optimizer step"
            raise self._error(None, "training", "none", expected)
        for layer, counts in self._counts.items():
            if self._sum_counts is not None:
                counts = self._sum_counts(counts)
            block = self._blocks[layer]
            bias = _selection_bias(block, self.model_type)
            if bias.numel() != counts.numel():
                found = f"{bias.numel()} entries, {counts.numel()} experts counted since the last step"
                raise self._error(block, "selection bias", found, "after_optimizer_step before the pruning, or gather_")
            with torch.no_grad():
                bias.add_(losses.bias_update(counts, self._strength).view_as(bias).to(bias.device))
        self._num_forwards = 0
        self._counts.clear()

    def gather_(self, layer: int, order: Sequence[int] | Tensor) -> None:
        """Reorder or prune the counters of one layer, order[new] = old id. Does nothing right after a step.

        Raises:
            SecateurError: no such MoE layer.
        """
        if layer not in self._blocks:
            raise self._error(None, "layer", str(layer), f"one of the MoE layers {sorted(self._blocks)}")
        if (counts := self._counts.get(layer)) is not None:
            self._counts[layer] = counts[torch.as_tensor(order, dtype=torch.int64, device=counts.device)]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._clear()
        self._capturing = module.training and torch.is_grad_enabled()

    def _clear(self, *_: Any) -> None:
        self._capturing = False
        self._logits.clear()
        self._index.clear()

    # Hooks inside a checkpointed layer only keep references: an operation here would be missing in the recomputation.

    def _router_hook(self, block: MoEBlock) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._capturing:
                return
            if not (isinstance(output, tuple) and len(output) == 3 and is_matrix(output[0], floating=True)):
                raise self._error(block, "router output", describe(output), "(logits (T, E), weights, index)")
            if block.layer in self._logits:
                raise self._error(block, "router", "a second call in one forward", "one call")
            if self._loss is not None and not torch.is_grad_enabled():
                found = "a run without gradients (reentrant gradient checkpointing): the loss would reach no parameter"
                expected = "gradient_checkpointing_kwargs={'use_reentrant': False}"
                raise self._error(block, "router", found, expected)
            self._logits[block.layer] = output[0]

        return hook

    def _experts_hook(self, block: MoEBlock) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._capturing:
                return
            logits = self._logits.get(block.layer)
            try:
                index = read_call(f"{block.name}.experts", args, kwargs).index
            except SecateurError:
                index = None
            if logits is None or index is None or len(index) != len(logits):
                expected = f"(hidden (T, H), index (T, K), weights (T, K)) after logits (T, E), here {describe(logits)}"
                raise self._error(block, "experts arguments", describe((*args, *kwargs.values())), expected)
            self._index[block.layer] = index

        return hook

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        names = inspect.signature(module.forward).parameters if args else ()
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if not self._capturing or (self._loss is not None and inputs.get("labels") is None):
            return None
        for layer, block in self._blocks.items():
            if layer not in self._index:
                raise self._error(block, "experts", "no call in a training forward", "one call")
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        num_rows = next(iter(self._logits.values())).shape[0]
        token_mask = losses.real_tokens(tokens, inputs.get("attention_mask"), num_rows)
        if self._loss is None:
            self._count(token_mask)
        else:
            self._add_loss(self._loss, inputs, token_mask, output)
        self._num_forwards += 1
        return output

    def _count(self, token_mask: Tensor) -> None:
        for layer, index in self._index.items():
            counts = losses.sequence_counts(index, self._logits[layer].shape[1], token_mask).sum(dim=0)
            before = self._counts.get(layer, torch.zeros_like(counts))
            if before.shape != counts.shape:
                found = f"{counts.numel()} experts after {before.numel()} in one optimizer step"
                raise self._error(self._blocks[layer], "router", found, "gather_ at the pruning")
            self._counts[layer] = before + counts

    def _add_loss(self, loss: Loss, inputs: dict[str, Any], token_mask: Tensor, output: Any) -> None:
        if _wants_router_logits(self._model, inputs):
            raise self._error(None, "output_router_logits", "True (transformers adds its own loss then)", "False")
        if not isinstance(output, dict) or not isinstance(output.get("loss"), Tensor):
            raise self._error(None, "model output", type(output).__name__, "a dict-like output with a loss")
        total = output["loss"]
        values = [loss(self._affinity(self._logits[i]), self._index[i], token_mask) for i in sorted(self._index)]
        value = torch.stack([value.to(total.device) for value in values]).mean()
        self.last_value = value.detach()
        if inputs.get("num_items_in_batch") is not None:  # cross-entropy is a sum over that many then
            share = losses.target_share(inputs["labels"], inputs.get("shift_labels"), inputs["num_items_in_batch"])
            value = share.to(total.device) * value
        output["loss"] = total + self._strength * value

    def _error(self, block: MoEBlock | None, what: str, found: str, expected: str) -> SecateurError:
        where = f"balance {self.kind!r} on {self.model_type}" + (f", {block.name}" if block else "")
        return SecateurError(f"{where}: {what}: found {found}; expected {expected}")


def attach_balance(
    model: nn.Module,
    kind: str,
    *,
    blocks: Mapping[int, MoEBlock],
    coefficient: float | None = None,
    update_rate: float | None = None,
    model_type: str | None = None,
    sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> BalanceHandle:
    """Balance the experts of ``model`` (a transformers MoE causal LM) in one of the ways of `BALANCE`.

    "mixtral" and "deepseek_v3" add ``coefficient * mean over layers of the layer's loss`` to the loss of every training
    forward with labels (evaluation is untouched); with ``num_items_in_batch`` weighted by the micro-batch's share of
    the targets. "bias" adds no loss and needs `BalanceHandle.after_optimizer_step` (see `BalanceCallback`).

    Args:
        blocks: the MoE layers of ``model`` by layer number.
        coefficient, update_rate: weight of the loss, step of the bias; None = the default of the kind.
        model_type: family to look up where ``model.config.model_type`` is a derived one.
        sum_counts: in a job of several processes, adds up counts over those with other tokens (for kind "bias"; the
            losses are of each process's own tokens, as is usual).

    Raises:
        SecateurError: unknown kind; a strength that the kind does not use or that is not above 0; no MoE layers; a
            family without a known scoring or selection bias; output_router_logits=True with a loss; attached already.
    """
    if kind not in BALANCE:
        raise SecateurError(f"balance: found {kind!r}; expected one of {sorted(BALANCE)}")
    model_type = model_type or str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    where, entry = f"balance {kind!r} on {model_type}", BALANCE[kind]
    strengths = {"coefficient": (coefficient, entry.coefficient), "update_rate": (update_rate, entry.update_rate)}
    for name, (given, default) in strengths.items():
        if given is not None and (default is None or not (math.isfinite(given) and given > 0)):
            raise SecateurError(f"{where}: {name}: found {given}; expected {'a number > 0' if default else 'none'}")
    strength = next((given or default for given, default in strengths.values() if default), 0.0)
    if kind != "none" and not blocks:
        raise SecateurError(f"{where}: found no MoE layers; expected at least one")
    if model in _attached:
        raise SecateurError(f"{where}: the model has a balance already; expected detach() first")
    if entry.loss and _wants_router_logits(model, {}):
        raise SecateurError(f"{where}: config.output_router_logits: found True (its own loss is added); expected False")
    if entry.scoring is not None and model_type not in entry.scoring:
        raise SecateurError(f"{where}: scoring is known for {sorted(entry.scoring)}; found {model_type}")
    if entry.update_rate:
        if sum_counts is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise SecateurError(f"{where}: found several processes, each with its own counts; give sum_counts")
        for block in blocks.values():
            _selection_bias(block, model_type)
    affinity = (entry.scoring or {}).get(model_type, losses.softmax_affinity)
    return BalanceHandle(
        model, kind, blocks, model_type=model_type, affinity=affinity, strength=strength, sum_counts=sum_counts
    )


class BalanceCallback(TrainerCallback):
    """Calls `BalanceHandle.after_optimizer_step` in a transformers Trainer; use it for every kind.

    In ``on_optimizer_step``, which always comes before the ``on_step_end`` of a pruning callback.
    """

    def __init__(self, handle: BalanceHandle) -> None:
        self.handle = handle

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        self.handle.after_optimizer_step()


def _selection_bias(block: MoEBlock, model_type: str) -> Tensor:
    if model_type not in SELECTION_BIAS:
        known = ", ".join(sorted(SELECTION_BIAS))
        raise SecateurError(
            f"balance 'bias' on {model_type}: found no selection bias; the families that have it: {known}"
        )
    owner, path = SELECTION_BIAS[model_type]
    bias: Any = getattr(block, owner)
    for part in path.split("."):
        bias = getattr(bias, part, None)
    if not isinstance(bias, Tensor) or bias.dtype != torch.float32:
        # In 16 bits a step of update_rate is lost once the bias has grown.
        found = f"{owner}.{path} = {describe(bias)}"
        raise SecateurError(f"balance 'bias' on {model_type}, {block.name}: found {found}; expected a float32 tensor")
    return bias


def _wants_router_logits(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    asked = inputs.get("output_router_logits")
    return bool(getattr(getattr(model, "config", None), "output_router_logits", False) if asked is None else asked)
