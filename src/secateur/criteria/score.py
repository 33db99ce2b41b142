"""Scores of all layers by a criterion of the table, after checking that there is what the criterion needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.criteria import CRITERIA, Criterion
from secateur.criteria.router_change import RouterChange
from secateur.criteria.weights import WeightStats
from secateur.errors import SecateurError
from secateur.stats import DEFAULT_SUMS, SUMS, RouterStats

Weights = Mapping[int, WeightStats] | Mapping[int, RouterChange]
KINDS = {"expert weights": WeightStats, "router weights": WeightStats, "router change": RouterChange}


def find_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        SecateurError: there is none; the message lists what there is.
    """
    if name not in CRITERIA:
        raise SecateurError(f"criterion is {name!r}, expected one of {', '.join(CRITERIA)}")
    return CRITERIA[name]


def score_layers(
    name: str,
    num_experts: Mapping[int, int],
    *,
    stats: RouterStats | None = None,
    weights: Weights | None = None,
    seed: int = 0,
) -> dict[int, Tensor]:
    """{layer: (E,) float64 scores}, higher = keep, all finite.

    Args:
        num_experts: {layer: E}, the layers to score.
        stats: of these layers, for criteria that need data.
        weights: {layer: WeightStats}, for criteria that need weights, or {layer: RouterChange}.
        seed: of "random".

    Raises:
        SecateurError: no such criterion; what it needs is not given, is about other layers, or has no token or weight;
            a score that is not finite. The message names criterion, layer and field.
    """
    criterion = find_criterion(name)
    where = f"criterion {name!r}"
    if stats is not None:
        _check_layers(
            where,
            "statistics",
            num_experts,
            {layer: layer_stats.num_experts for layer, layer_stats in stats.layers.items()},
        )
    if weights is not None:
        _check_layers(
            where,
            "weights",
            num_experts,
            {layer: layer_weights.num_experts for layer, layer_weights in weights.items()},
        )
    if criterion.needs == "nothing":
        scores = {layer: criterion.function(count, seed=seed, layer=layer) for layer, count in num_experts.items()}
    elif isinstance(criterion.needs, tuple):
        checked = _checked_stats(where, criterion.needs, num_experts, stats)
        scores = {layer: criterion.function(checked.layers[layer]) for layer in num_experts}
    else:
        summaries = _checked_weights(where, criterion.needs, num_experts, weights)
        scores = {layer: criterion.function(summaries[layer]) for layer in num_experts}
    for layer, values in scores.items():
        wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if wrong:
            raise SecateurError(f"{where}, layer {layer}: the scores of experts {wrong} are not finite")
    return scores


def never_routed(stats: RouterStats) -> dict[int, tuple[int, ...]]:
    """{layer: ids of the experts that no token reached}, for layers that have any."""
    return _where({layer: layer_stats.token_count == 0 for layer, layer_stats in stats.layers.items()})


def zero_weights(weights: Weights) -> dict[int, tuple[int, ...]]:
    """{layer: ids of the experts whose weights are all 0}, for layers that have any."""
    return _where(
        {
            layer: layer_weights.square_sum == 0
            for layer, layer_weights in weights.items()
            if isinstance(layer_weights, WeightStats)
        }
    )


def _where(flags: Mapping[int, Tensor]) -> dict[int, tuple[int, ...]]:
    found = {layer: tuple(flag.nonzero().flatten().tolist()) for layer, flag in sorted(flags.items())}
    return {layer: ids for layer, ids in found.items() if ids}


def _checked_stats(
    where: str, needs: tuple[str, ...], num_experts: Mapping[int, int], stats: RouterStats | None
) -> RouterStats:
    if stats is None:
        raise SecateurError(f"{where} needs {', '.join(needs)}: statistics of the model on data, found none")
    present = ("token_count", *stats.sums)
    missing = [field for field in needs if field not in present]
    if missing:
        asked = [f"--sums {field}" for field in missing if field in SUMS and field not in DEFAULT_SUMS]
        raise SecateurError(
            f"{where} needs {', '.join(missing)}, but the statistics have only {', '.join(present)}"
            + (f"; observe the model with {' '.join(asked)}" if asked else "")
        )
    for layer in num_experts:
        if not stats.layers[layer].token_count.any():
            raise SecateurError(f"{where}, layer {layer}: token_count is 0 for every expert, expected some tokens")
    return stats


def _checked_weights(where: str, needs: str, num_experts: Mapping[int, int], weights: Weights | None) -> Weights:
    if weights is None:
        raise SecateurError(f"{where} needs {needs}, found none")
    for layer in num_experts:
        layer_weights = weights[layer]
        if not isinstance(layer_weights, KINDS[needs]):
            raise SecateurError(f"{where} needs {needs}, found {type(layer_weights).__name__}")
        if isinstance(layer_weights, RouterChange):
            continue
        read = layer_weights.num_weights if needs == "expert weights" else layer_weights.router_square_sum.any()[None]
        if not read.all():
            raise SecateurError(f"{where}, layer {layer}: {needs} are missing or, for a router, all 0")
    return weights


def _check_layers(where: str, what: str, expected: Mapping[int, int], found: Mapping[int, int]) -> None:
    if dict(expected) != dict(found):
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        layers = sorted({layer for layer, _ in wrong})
        raise SecateurError(
            f"{where}: {what} do not fit the model in layers {layers}: they are about experts "
            f"{ {layer: found.get(layer, 0) for layer in layers} }, "
            f"expected { {layer: expected.get(layer, 0) for layer in layers} }"
        )
