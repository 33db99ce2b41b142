"""`secateur pretrain` with another choice: as many experts of each layer go as the rule says, and chance says which.

    python benchmarks/laep_random.py pretrain --out RUN --target-params 0.75 --seed 0 ...

The control that must lose if loads tell which experts a layer can do without. Takes the arguments of `secateur`.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch

from secateur.cli import main
from secateur.plans import LayerPlan, Plan
from secateur.stats import RouterStats
from secateur.train import laep

decide = laep.decide


def drawn(stats: RouterStats, *arguments: Any, **more: Any) -> Plan:
    """The plan of `secateur.decide.rule.decide` with drawn experts; statistics and counts seed the draw."""
    plan = decide(stats, *arguments, **more)
    counts = [one.experts_after for one in plan.layers.values()]
    drawn_for = hashlib.sha256(f"{stats.digest()} {counts}".encode()).hexdigest()
    draw = torch.Generator().manual_seed(int(drawn_for[:12], 16))
    layers, lost = {}, {}
    for layer, one in plan.layers.items():
        kept = torch.randperm(one.experts_before, generator=draw)[: one.experts_after].sort().values.tolist()
        layers[layer] = LayerPlan(experts_before=one.experts_before, order=tuple(kept))
        lost[layer] = sum(stats.loads()[layer][expert] for expert in layers[layer].dropped)
    total = {layer: sum(loads) for layer, loads in stats.loads().items()}
    details: dict[str, Any] = {
        "rule": plan.details["rule"],
        "rerouted_share": sum(lost.values()) / sum(total.values()),
        "layers": {str(layer): {"rerouted_share": lost[layer] / total[layer]} for layer in lost},
    }
    return Plan(layers=layers, criterion="random", details=details, stats_digest=plan.stats_digest)


if __name__ == "__main__":
    laep.decide = drawn  # type: ignore[assignment]
    sys.exit(main())
