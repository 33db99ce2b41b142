"""What a plan needs to know of a model folder."""

from __future__ import annotations

import hashlib
import json

from secateur.checkpoint.inspect import bytes_per_expert
from secateur.checkpoint.survey import Survey
from secateur.observation import ModelFacts


def facts(found: Survey) -> ModelFacts:
    """Of the decoder layers; multi-token-prediction layers are left to `--mtp`."""
    folder, model = found.folder, found.model
    per_expert = bytes_per_expert(found)
    return ModelFacts(
        model_type=model.model_type,
        digest=_digest(found),
        top_k=model.top_k,
        num_groups=model.num_groups,
        min_experts=model.min_experts,
        total_bytes=folder.num_bytes,
        has_one_count=model.is_nested,
        num_experts=dict(found.counts),
        bytes_per_expert={layer: per_expert[layer] for layer in found.counts},
    )


def _digest(found: Survey) -> str:
    """Of what a plan is about. A fine-tuned or quantised variant of a model has the same: its routers do."""
    routers = sorted(
        [place.layer, list(found.folder.tensors[name].shape)]
        for name, place in found.located.items()
        if place.role == "router" and place.layer in found.counts
    )
    model = found.model
    described = [model.text.model_type, model.top_k, model.num_groups, sorted(found.counts.items()), routers]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
