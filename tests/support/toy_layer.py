"""What the experts of one layer do with some tokens, in plain tensors, and the statistics of it by the rows of SUMS.

TOY is small enough to work out every score by hand; the examples of `secateur.criteria.activation` are about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.criteria.score import score_layers
from secateur.observation.running_sums import RunningSums
from secateur.stats import SUMS, LayerStats, RouterStats, Seen


@dataclass(frozen=True, kw_only=True)
class Layer:
    """gates (T, E), 0 where the token is not routed there; outputs (E, T, D), neurons (E, T, F), inputs (T, D)."""

    gates: Tensor
    outputs: Tensor
    neurons: Tensor
    inputs: Tensor

    def of_tokens(self, part: Tensor) -> Layer:
        return Layer(
            gates=self.gates[part],
            outputs=self.outputs[:, part],
            neurons=self.neurons[:, part],
            inputs=self.inputs[part],
        )

    def scaled(self, name: str, factor: float) -> Layer:
        return dataclasses.replace(self, **{name: getattr(self, name) * factor})

    def stats(self, parts: int = 1, keep: Tensor | None = None) -> LayerStats:
        """Every sum of the table, of calls with a part of the tokens each."""
        running = RunningSums(SUMS, self.gates.shape[1])
        for part in torch.arange(len(self.gates)).tensor_split(parts):
            self.of_tokens(part).add_to(running, None if keep is None else keep[part])
        return running.read()

    def add_to(self, running: RunningSums, keep: Tensor | None = None) -> None:
        tokens, experts = self.gates.nonzero().unbind(dim=1)
        num_experts = self.gates.shape[1]
        seen = Seen(
            name="toy",
            num_experts=num_experts,
            outputs=self.outputs[experts, tokens],
            gates=self.gates[tokens, experts],
            experts=experts if keep is None else experts.masked_fill(~keep[tokens], num_experts),
            tokens=tokens,
            inputs=self.inputs,
            activations=self.neurons[experts, tokens],
        )
        running.add_router_call(self.inputs, keep)
        running.add_call(seen, keep)


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Output of expert e on token t: outputs[e][t]; the gates, renormalised.
TOY = Layer(
    gates=numbers([[2 / 3, 1 / 3, 0], [0, 5 / 9, 4 / 9], [7 / 9, 2 / 9, 0]]),
    outputs=numbers([[[3, 4], [0, 1], [0, 2]], [[1, 0], [0, 2], [-3, 0]], [[7, 0], [8, 6], [0, 1]]]),
    neurons=numbers(
        [[[1, 2, 0], [9, 9, 9], [0, 1, 3]], [[2, 0, 1], [1, 1, 0], [0, 0, 2]], [[9, 9, 9], [1, 0, 4], [9] * 3]]
    ),
    inputs=numbers([[3, 0], [1, 1], [0, 4]]),
)
RAW_GATES = numbers([[0.6, 0.3, 0], [0, 0.5, 0.4], [0.7, 0.2, 0]])


def layer_with_loads(loads: list[int], seed: int = 0) -> Layer:
    """A top-1 router that sends so many tokens to each expert, with random gates."""
    rng = torch.Generator().manual_seed(seed)
    experts = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    weights = 0.5 + torch.rand(len(experts), 1, generator=rng, dtype=torch.float64)
    gates = torch.zeros(len(experts), len(loads), dtype=torch.float64).scatter_(1, experts[:, None], weights)
    return _with_random_values(gates, rng)


def random_layer(seed: int, num_tokens: int = 40) -> Layer:
    """A top-2 router over 6 experts, the last never chosen."""
    rng = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(num_tokens, 6, generator=rng, dtype=torch.float64)
    probabilities[:, -1] = 0
    top = probabilities.topk(2)
    gates = torch.zeros_like(probabilities).scatter_(1, top.indices, top.values / top.values.sum(1, keepdim=True))
    return _with_random_values(gates, rng)


def _with_random_values(gates: Tensor, rng: torch.Generator) -> Layer:
    num_tokens, num_experts = gates.shape
    shapes = {
        "outputs": (num_experts, num_tokens, 5),
        "neurons": (num_experts, num_tokens, 4),
        "inputs": (num_tokens, 5),
    }
    values = {name: torch.randn(*shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    return Layer(gates=gates, **values)


def scores_of(name: str, stats: LayerStats) -> list[float]:
    """Of a criterion of the table."""
    found = score_layers(name, {0: stats.num_experts}, stats=RouterStats(layers={0: stats}))[0]
    assert found.dtype == torch.float64
    return [float(score) for score in found]


def of_toy(criterion: Callable[[LayerStats], Tensor]) -> list[float]:
    """The scores of TOY, to six digits."""
    return [round(score, 6) + 0.0 for score in criterion(TOY.stats()).tolist()]
