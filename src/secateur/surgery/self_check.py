"""Is a model that was just pruned right? Its logits, and where these round otherwise, each layer by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families import MoEModel, logits_of
from secateur.plans import Plan
from secateur.surgery.oracle import barred_experts

MOST_TOKENS = 256  # of a sequence, as the outputs of all layers are kept through the pruning
CLOSE = 1e-3  # of the largest logit or output: rounding in float32 is far below, another expert far above


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the barred-experts oracle computes. outputs: {layer: what its MoE block returns}, (1, S, D)."""

    sample: Tensor
    logits: Tensor
    outputs: Mapping[int, Tensor]


def expected_of(moe: MoEModel, plan: Plan, sample: Tensor) -> Expected:
    """Run the model before a pruning as the plan will have it; sample: (1, S) token ids."""
    sample = sample[:, :MOST_TOKENS]
    outputs: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> None:
        outputs[layer] = output

    with barred_experts(moe, plan), _listening(moe, keep):
        logits = logits_of(moe.model, sample)
    return Expected(sample=sample, logits=logits, outputs=outputs)


def logit_difference(moe: MoEModel, expected: Expected) -> tuple[float, float]:
    """The largest difference of a logit of the pruned model, absolute and as a share of the largest logit.

    It is 0 where the experts keep their order and matrix products of other shapes round alike.
    """
    found = float((logits_of(moe.model, expected.sample) - expected.logits).abs().max())
    return found, _share(found, expected.logits)


def layer_excess(moe: MoEModel, expected: Expected, num_parts: int) -> tuple[float, str]:
    """How far the worst layer of the pruned model is above its bound (1 is at it), and a line about it.

    Every layer runs on what the oracle gave the layer before, so roundings neither grow from layer to layer nor send a
    token to another expert. What is left is the order in which the outputs of a token's experts are added up. With `n`
    summands of one sign two orders differ by at most `2 (n - 1) u` of the sum (u half of the type's eps); taking
    the largest output for the sum, and twice that for cancellation, the bound is `2 n eps`, and at least CLOSE.

    Args:
        num_parts: sums over ranks that are added up, 1 without.
    """
    worst, line = 0.0, "no layer differs"

    def compare(layer: int, output: Tensor) -> Tensor:
        nonlocal worst, line
        known = expected.outputs[layer]
        share = _share(float((output - known).abs().max()), known)
        bound = max(CLOSE, 2 * (moe.top_k + num_parts) * torch.finfo(known.dtype).eps)
        if not share / bound <= worst:
            worst = share / bound
            line = f"layer {layer} differs by {share:.2g} of its largest output, expected at most {bound:.2g}"
        return known

    with _listening(moe, compare):
        logits = logits_of(moe.model, expected.sample)
    rest = _share(float((logits - expected.logits).abs().max()), expected.logits)
    if not rest <= CLOSE:
        return max(worst, rest / CLOSE), f"outside its experts it differs by {rest:.2g} of the largest logit"
    return worst, line


def _share(difference: float, of: Tensor) -> float:
    return difference / max(float(of.abs().max()), torch.finfo(of.dtype).tiny)


@contextlib.contextmanager
def _listening(moe: MoEModel, listen: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Give `listen` what each MoE block returns; what it gives back, if anything, takes its place."""

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def heard(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            put = listen(layer, first.detach())
            if put is None:
                return None
            return (put, *output[1:]) if isinstance(output, tuple) else put

        return heard

    handles = [block.block.register_forward_hook(hook(layer)) for layer, block in moe.blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
