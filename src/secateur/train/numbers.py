"""The numbers of a run's loads for loggers: flat, and readable for a model of sixty layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

PREFIX = "laep/"
PERCENTILES = (50, 75, 90, 95)


def load_numbers(loads: Mapping[int, Sequence[int]], *, by_layer: bool = False) -> dict[str, float]:
    """Of the loads of a window, {layer: tokens of each expert}.

    The load of a layer's busiest expert over the mean, as the mean, least, most and percentiles over the layers; and
    how many experts got no token at all. `by_layer` adds both for each layer.
    """
    ratios = {layer: max(one) * len(one) / max(sum(one), 1) for layer, one in loads.items()}
    dead = {layer: sum(count == 0 for count in one) for layer, one in loads.items()}
    values = np.array(list(ratios.values()))
    name = f"{PREFIX}max_over_mean"
    numbers = {name: float(values.mean()), f"{name}/min": float(values.min()), f"{name}/max": float(values.max())}
    numbers |= {f"{name}/p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
    numbers[f"{PREFIX}dead_experts"] = sum(dead.values())
    if by_layer:
        numbers |= {f"{name}/layer_{layer}": ratio for layer, ratio in ratios.items()}
        numbers |= {f"{PREFIX}dead_experts/layer_{layer}": count for layer, count in dead.items()}
    return numbers
