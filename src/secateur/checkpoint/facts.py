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
    tensors = [(name, one.dtype, one.shape) for name, one in sorted(folder.tensors.items())]
    per_expert = bytes_per_expert(found)
    return ModelFacts(
        model_type=model.model_type,
        digest=hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
        top_k=model.top_k,
        num_groups=model.num_groups,
        min_experts=model.min_experts,
        total_bytes=folder.num_bytes,
        num_experts=dict(found.counts),
        bytes_per_expert={layer: per_expert[layer] for layer in found.counts},
    )
