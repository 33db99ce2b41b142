"""Super-experts: the few whose outputs are so large that dropping one of them breaks a model (arXiv 2507.23279)."""

from __future__ import annotations

import torch

from secateur.errors import SecateurError
from secateur.stats import RouterStats

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75


def super_experts(stats: RouterStats) -> dict[int, tuple[int, ...]]:
    """{layer: expert ids, ascending}, for the layers that have any.

    An expert is one when the largest absolute entry of its outputs is above both the 99.5 % quantile over all experts
    of all layers (linear between neighbours) and a tenth of the largest, and its layer is among the first three
    quarters of the layers of `stats`. The thresholds are those of the code published with REAP (arXiv 2510.13999).

    Raises:
        SecateurError: the statistics have no `max_activation`.
    """
    if "max_activation" not in stats.sums:
        raise SecateurError("super-experts are found by max_activation, which the statistics do not have")
    largest = {layer: layer_stats.sums["max_activation"] for layer, layer_stats in stats.layers.items()}
    everywhere = torch.cat(list(largest.values()))
    threshold = max(float(everywhere.quantile(QUANTILE)), float(everywhere.max()) * SHARE_OF_LARGEST)
    early = list(largest)[: int(SHARE_OF_LAYERS * len(largest))]
    found = {layer: tuple((largest[layer] > threshold).nonzero().flatten().tolist()) for layer in early}
    return {layer: ids for layer, ids in found.items() if ids}
