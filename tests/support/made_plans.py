"""Random plans of one layer, with sources, weights and neurons; weights are eighths, so that sums are exact."""

from __future__ import annotations

import random

from secateur.plans import LayerPlan, Neurons, Plan, Source


def shares(rng: random.Random, count: int) -> list[float]:
    """Weights of eighths that sum up to 1."""
    cuts = sorted(rng.choices(range(9), k=count - 1))
    return [(high - low) / 8 for low, high in zip([0, *cuts], [*cuts, 8], strict=True)]


def random_layer(rng: random.Random, num_experts: int, width: int, *, parts: bool = True) -> LayerPlan:
    """Any layer plan of dyadic weights; with `parts` of neurons as well."""
    order = rng.sample(range(num_experts), rng.randint(1, num_experts))
    kept = rng.randint(1, width) if parts and rng.random() < 0.5 else width
    sources = {}
    for new, old in enumerate(order):
        if kept == width and rng.random() < 0.4:
            continue  # a copy
        entry: dict[tuple[int, Neurons | None], None] = {}
        for expert in [old, *rng.choices(range(num_experts), k=rng.randint(0, 3))]:
            neurons = Neurons(rng.sample(range(width), kept))
            listed = parts and (kept < width or rng.random() < 0.5) and not neurons.is_identity(width)
            entry[expert, neurons if listed else None] = None
        weights = shares(rng, len(entry))
        sources[new] = tuple(
            Source(expert=expert, weight=weight, neurons=neurons)
            for (expert, neurons), weight in zip(entry, weights, strict=True)
        )
    return LayerPlan(experts_before=num_experts, order=tuple(order), sources=sources, width_before=width)


def plan_of(layer: LayerPlan, **rest: str) -> Plan:
    return Plan(layers={3: layer}, criterion="test", **rest)  # type: ignore[arg-type]
